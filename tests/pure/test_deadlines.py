"""Deadlines of calls: one timer for all calls that have the same time."""

import asyncio
import time
from typing import Any, cast

import pytest

from qserve.broker.large.lending import Lending
from qserve.calls.deadlines import Deadlines
from qserve.calls.pending import PendingCall, PendingCalls
from qserve.errors import GetTimeoutError
from qserve.settings import Settings
from qserve.wire.channel import CREDIT, DATA, Chunk
from qserve.wire.messages import Signer
from tests.support.waiting import until


class Away:
    """A link that is down, and what would withdraw calls over it."""

    is_open = False

    def __init__(self) -> None:
        self.sender = self
        self.withdrawn: list[str] = []

    def withdraw(self, call: PendingCall) -> None:
        self.withdrawn.append(call.id)


class Calls:
    """The calls of a process, and their deadlines."""

    def __init__(self) -> None:
        settings = Settings()
        self.pending = PendingCalls(Lending("me", "", settings.keys, Signer(settings.secrets)))
        self.away = Away()
        self.ended: list[tuple[str, object]] = []
        self.ended_at: dict[str, float] = {}
        link = cast(Any, self.away)
        self.deadlines = Deadlines(settings.keys, link, self.pending, link, 5.0)
        self.deadlines.open(asyncio.get_running_loop())

    def start(self, name: str, timeout_s: float) -> PendingCall:
        call = PendingCall(name, "hello", True, b"", None, timeout_s, lambda outcome: self._note(name, outcome))
        self.pending[name] = call
        self.deadlines.start(call)
        return call

    def _note(self, name: str, outcome: object) -> None:
        self.ended.append((name, outcome))
        self.ended_at[name] = time.monotonic()

    @property
    def rows(self) -> list[float]:
        return list(self.deadlines._rows)

    async def all_ended(self) -> list[str]:
        await until(lambda: not self.pending)
        return [name for name, outcome in self.ended if isinstance(outcome, GetTimeoutError)]


@pytest.fixture
async def calls() -> Calls:
    return Calls()


async def test_calls_end_at_their_deadlines_in_the_order_of_these(calls: Calls) -> None:
    calls.start("late", 0.06)
    for name in ("first", "second"):
        calls.start(name, 0.02)

    assert await calls.all_ended() == ["first", "second", "late"]
    assert calls.away.withdrawn == ["first", "second", "late"]
    await until(lambda: not calls.rows)


async def test_a_call_that_has_ended_is_forgotten_at_once_and_its_row_at_the_next_look(calls: Calls) -> None:
    call = calls.start("quick", 0.02)
    calls.pending.settle(call, GetTimeoutError("for another reason"))

    assert (call.row, calls.rows) == (None, [0.02])
    await until(lambda: not calls.rows)
    assert calls.away.withdrawn == []


async def test_a_row_goes_on_as_long_as_calls_come(calls: Calls) -> None:
    one = calls.start("one", 0.03)
    await asyncio.sleep(0.015)
    two = calls.start("two", 0.03)

    assert await calls.all_ended() == ["one", "two"]
    assert [calls.ended_at[call.id] >= call.deadline for call in (one, two)] == [True, True]


async def test_calls_with_ever_other_times_leave_no_rows_behind(calls: Calls) -> None:
    started = [calls.start(str(number), 1000.0 + number) for number in range(200)]
    rows = len(calls.rows)
    assert rows < 100
    assert all((call.row is None) is not (call.timer is None) for call in started)

    for call in started:
        calls.pending.settle(call, GetTimeoutError("over"))

    assert all(call.row is None and call.timer is None for call in started)
    assert calls.start("short", 0.01).timer is not None
    assert await calls.all_ended() == [*map(str, range(200)), "short"]


async def test_a_sign_that_the_replica_takes_in_what_it_is_sent_starts_the_time_anew(calls: Calls) -> None:
    call = calls.start("upload", 30.0)

    calls.deadlines.put_off(call, Chunk("replica", CREDIT))
    assert (call.row, call.timer is None) == (None, False)
    calls.deadlines.put_off(call, Chunk("replica", DATA))
    assert (call.row, call.timer) == (None, None)
    calls.deadlines.put_off(call, Chunk("replica", CREDIT))

    assert (call.row, call.timer) == (None, None)
