"""What a replica makes of its user's `check_health`, and of an event loop that stands still."""

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from qserve.errors import BrokerUnavailable
from qserve.wire.spec import STALLED, UNHEALTHY
from qserve_workers.replica.health import HealthChecks
from qserve_workers.replica.stalls import StallWatch
from tests.support.waiting import until

NOBODY: Any = None
"""The client of Redis that `Told` does not need."""


class Patient:
    """User code that is as well as a test says."""

    has_health_check = True

    def __init__(self) -> None:
        self.problems: list[BaseException | None] = []
        self.checks = 0
        self.hangs = asyncio.Event()

    async def check_health(self, begins: Callable[[], None]) -> None:
        begins()
        self.checks += 1
        if not self.problems:
            await self.hangs.wait()
        problem = self.problems.pop(0)
        if problem is not None:
            raise problem


def slots_of(*calls: Any, period_s: float = 0.0, timeout_s: float = 0.01) -> Any:
    spec = SimpleNamespace(name="Code", health_check_period_s=period_s, health_check_timeout_s=timeout_s)
    return SimpleNamespace(spec=spec, calls=calls)


class Checked:
    """The checks of one patient, and what was told of them."""

    def __init__(self) -> None:
        self.code: Any = Patient()
        self.told: list[tuple[str, bool]] = []
        self.checks = HealthChecks("Code#1", slots_of(), self._changed)

    def _changed(self) -> None:
        self.told.append((self.checks.problem.rpartition(": ")[2], self.checks.is_ill))


async def test_three_failures_in_a_row_make_it_ill_and_a_success_ends_the_row() -> None:
    it = Checked()
    it.code.problems = [ValueError("1"), ValueError("2"), None, *(ValueError(str(n)) for n in range(3, 6))]
    checking = asyncio.create_task(it.checks.go_on(it.code))

    await until(lambda: it.checks.is_ill)
    checking.cancel()

    assert it.told == [("1", False), ("2", False), ("", False), ("3", False), ("4", False), ("5", True)]
    assert "check_health has failed 3 times in a row: ValueError" in it.checks.problem


async def test_a_check_that_hangs_is_overdue() -> None:
    it = Checked()
    assert it.checks.overdue_s() is None
    checking = asyncio.create_task(it.checks.go_on(it.code))

    assert await until(it.checks.overdue_s) > 0.01
    checking.cancel()


@pytest.mark.parametrize("problem", [None, ValueError("1")])
async def test_a_check_that_has_ended_is_not_overdue_however_long_ago_that_was(problem: Exception | None) -> None:
    it = Checked()
    it.code.problems = [problem]
    await it.checks._check(it.code)
    await asyncio.sleep(0.02)
    assert it.checks.overdue_s() is None


async def test_the_first_check_has_to_succeed_in_time() -> None:
    it = Checked()
    with pytest.raises(TimeoutError, match=r"check_health has not returned within 0\.01 s"):
        await it.checks.first(it.code)
    it.code.problems = [TimeoutError("its own")]
    with pytest.raises(TimeoutError, match="its own"):
        await it.checks.first(it.code)
    it.code.has_health_check = False
    await it.checks.first(it.code)
    await it.checks.go_on(it.code)  # there is nothing to go on with
    assert it.code.checks == 2


class Told:
    """What a watch has published."""

    def __init__(self, problem: Exception | None = None) -> None:
        self.problem = problem
        self.states: list[tuple[str, str]] = []

    def __call__(self, _client: object, state: str, problem: str) -> None:
        self.states.append((state, problem))
        if self.problem is not None:
            raise self.problem


async def look(told: Told, blocked_s: float, *calls: Any) -> StallWatch:
    """Look at this event loop from another thread while it stands in a call of `time.sleep` of this module."""
    watch = StallWatch("Code#1", slots_of(*calls), lambda: None, told)
    looking = asyncio.get_running_loop().run_in_executor(None, lambda: watch.look(NOBODY, blocked_s))
    time.sleep(0.05)  # noqa: ASYNC251 this is the stall
    await looking
    return watch


async def test_a_blocked_loop_is_told_with_the_method_and_the_line_once_until_it_goes_on() -> None:
    told, call = Told(), SimpleNamespace(task=asyncio.current_task(), call=SimpleNamespace(method="predict"))

    watch = await look(told, 1.5, call)
    watch.look(NOBODY, 1.6)

    ((state, problem),) = told.states
    assert state == STALLED
    assert "method predict has blocked the event loop for more than 1 s, at " in problem
    assert f"{__file__}, line " in problem
    assert "make it `def`" in problem
    watch.look(NOBODY, 0.0)
    watch.look(NOBODY, 1.5)
    assert len(told.states) == 2


async def test_code_that_is_no_call_is_named_as_such_and_redis_may_be_away() -> None:
    told = Told(BrokerUnavailable("away"))
    await look(told, 1.5)
    ((_, problem),) = told.states
    assert problem.startswith("async code has blocked")


async def test_a_loop_that_runs_is_not_told() -> None:
    told = Told()
    await look(told, 0.5)
    assert told.states == []


async def test_a_check_that_hangs_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []
    monkeypatch.setattr("os._exit", ends.append)
    monkeypatch.setattr("faulthandler.dump_traceback", lambda *_args, **_options: None)
    told = Told()

    StallWatch("Code#1", slots_of(), lambda: 31.0, told).look(NOBODY, 0.0)

    assert ends == [1]
    assert told.states == [(UNHEALTHY, "its check_health has not returned within 31 s")]
