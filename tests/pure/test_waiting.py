"""The tests' own waiting: it returns what it waited for, or fails and says what that was."""

import asyncio
import itertools

import pytest

from tests.support import slowness, waiting
from tests.support.slowness import Slowness, patience
from tests.support.waiting import until, wait_until


def test_waiting_returns_what_the_condition_gives() -> None:
    answers = itertools.chain(["", None, 0], itertools.repeat("here"))
    assert wait_until(lambda: next(answers)) == "here"


async def test_a_condition_of_an_event_loop_may_be_asynchronous() -> None:
    answers = iter([False, False, True])

    async def asked() -> bool:
        await asyncio.sleep(0)
        return next(answers)

    assert await until(asked)


def test_a_wait_in_vain_fails_with_the_condition_its_last_answer_and_what_else_is_known() -> None:
    seen = ["never"]
    with pytest.raises(
        AssertionError, match=r"(?s)last answer was False to:\nwait_until\(lambda: 'odd' in seen.*output"
    ):
        wait_until(lambda: 'odd' in seen, 0.0, shows=lambda: "its output")  # fmt: skip


async def test_so_does_one_in_an_event_loop() -> None:
    with pytest.raises(AssertionError, match=r"waited .* in vain"):
        await until(lambda: None, 0.0)


def test_patience_grows_with_the_slowness_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slowness, "_slowness", measured := Slowness())
    monkeypatch.setattr(Slowness, "_measure", lambda _: 3.0)
    assert patience(20) == 60
    monkeypatch.setattr(Slowness, "_measure", lambda _: 1.0)
    assert measured.now() == 3.0  # what was measured a moment ago still counts


def test_a_load_that_begins_while_somebody_waits_gives_it_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = itertools.chain([0.0], itertools.repeat(60.0))
    monkeypatch.setattr(waiting, "patience", lambda _: next(allowed))
    asked = itertools.count()
    with pytest.raises(AssertionError):
        wait_until(lambda: next(asked) > 3)
    assert wait_until(lambda: next(asked) > 3)
