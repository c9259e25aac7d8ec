"""A replica that stood still for long: what it holds back, and what it then may start."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from qserve.broker.replica_queue import Entry
from qserve.errors import BrokerUnavailable
from qserve_workers.calls import absence
from qserve_workers.calls.absence import Absence
from tests.support.waiting import until

ONE, TWO = Entry(b"1-0", b"", 1), Entry(b"2-0", b"", 1)


class StoodStill:
    """An absence that has just been noticed, and what came of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, is_mine: Callable[[Entry], Awaitable[bool]]) -> None:
        self.begun: list[list[Entry]] = []
        self.may_go_on = True
        self.asked = 0
        self.now = 0.0
        monkeypatch.setattr(absence, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(absence, "_NEXT_TRY_S", 0.0)
        self.absence = Absence(3.0, is_mine, self.begun.append, self._may_go_on)
        assert not self.absence.noticed()
        self.now = 3.1

    async def _may_go_on(self) -> bool:
        self.asked += 1
        return self.may_go_on


async def test_calls_that_came_meanwhile_start_if_they_are_still_this_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    async def is_mine(entry: Entry) -> bool:
        return entry is TWO

    it = StoodStill(monkeypatch, is_mine)

    assert it.absence.noticed()
    assert it.absence.noticed()  # until it is dealt with, and it is dealt with once
    it.absence.hold([ONE, TWO])
    await until(lambda: it.begun)

    assert it.begun == [[TWO]]
    assert it.asked == 1
    assert not it.absence.noticed()


async def test_what_comes_while_it_asks_is_asked_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Entry] = []

    async def is_mine(entry: Entry) -> bool:
        if not asked:
            it.absence.hold([TWO])
        asked.append(entry)
        await asyncio.sleep(0)
        return True

    it = StoodStill(monkeypatch, is_mine)
    it.absence.noticed()
    it.absence.hold([ONE])
    await until(lambda: it.begun)

    assert it.begun == [[ONE, TWO]]


async def test_it_asks_again_when_redis_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Exception | bool] = [BrokerUnavailable("away"), True]

    async def is_mine(_: Entry) -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    it = StoodStill(monkeypatch, is_mine)
    it.absence.noticed()
    it.absence.hold([ONE])
    await until(lambda: it.begun)

    assert it.begun == [[ONE]]


async def test_one_that_is_outdated_leaves_what_it_holds_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def is_mine(_: Entry) -> bool:
        return True

    it = StoodStill(monkeypatch, is_mine)
    it.may_go_on = False
    it.absence.noticed()
    it.absence.hold([ONE])
    await until(lambda: it.asked)

    assert it.begun == []
    assert it.absence.noticed()  # it takes no calls any more
