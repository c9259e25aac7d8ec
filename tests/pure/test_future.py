"""The light future keeps the promises of `concurrent.futures.Future`, to waiters of every kind."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

import pytest

from qserve.calls import future as future_module
from qserve.calls.future import LightFuture
from tests.support.slowness import patience
from tests.support.waiting import joined


def in_thread(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_a_blocked_thread_gets_the_result() -> None:
    future: LightFuture[int] = LightFuture()
    got: list[int] = []
    waiting = in_thread(lambda: got.append(future.result(10)))

    future.set_result(3)

    joined(waiting)
    assert got == [3]


def test_an_exception_is_raised_to_every_waiter() -> None:
    future: LightFuture[int] = LightFuture()
    future.set_exception(ZeroDivisionError("x"))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="x"):
            future.result(0)


@pytest.mark.parametrize("end", ["set_result", "cancel", "set_exception"])
def test_wait_and_as_completed_see_every_kind_of_end(end: str) -> None:
    futures: list[LightFuture[int]] = [LightFuture() for _ in range(3)]
    ends: dict[str, Callable[[LightFuture[int]], object]] = {
        "set_result": lambda future: future.set_result(1),
        "cancel": lambda future: future.cancel(),
        "set_exception": lambda future: future.set_exception(ValueError("x")),
    }
    ended: list[concurrent.futures.Future[int]] = []
    waiting = in_thread(lambda: ended.extend(concurrent.futures.as_completed(futures, timeout=10)))

    for future in futures:
        ends[end](future)

    joined(waiting)
    assert set(ended) == set(futures)
    assert concurrent.futures.wait(futures, timeout=10).not_done == set()


def test_it_is_settled_once() -> None:
    future: LightFuture[int] = LightFuture()
    future.set_result(1)

    assert not future.cancel()
    with pytest.raises(concurrent.futures.InvalidStateError):
        future.set_result(2)
    assert future.result(0) == 1


def settle(start: threading.Barrier, future: LightFuture[int], number: int, wins: list[int]) -> None:
    start.wait(10)
    try:
        future.set_result(number)
    except concurrent.futures.InvalidStateError:
        return
    wins.append(number)


def test_only_one_of_many_racing_threads_settles_it() -> None:
    for _ in range(50):
        future: LightFuture[int] = LightFuture()
        wins: list[int] = []
        start = threading.Barrier(4)

        threads = [threading.Thread(target=settle, args=(start, future, number, wins)) for number in range(4)]
        for thread in threads:
            thread.start()
        joined(*threads)
        assert wins == [future.result(0)]


def test_callbacks_run_once_whenever_they_were_added() -> None:
    future: LightFuture[int] = LightFuture()
    called: list[object] = []
    future.add_done_callback(called.append)
    future.set_result(1)
    future.add_done_callback(called.append)

    assert called == [future, future]


def test_a_cancelled_one_raises_at_once() -> None:
    future: LightFuture[int] = LightFuture()

    assert future.cancel()
    assert future.cancelled()
    assert future.done()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(0)


def test_a_timeout_leaves_it_pending() -> None:
    future: LightFuture[int] = LightFuture()
    with pytest.raises(TimeoutError):
        future.result(0.01)
    future.set_result(1)
    assert future.result(0) == 1


@pytest.mark.parametrize("end", ["set_result", "cancel", "set_exception"])
def test_who_holds_its_condition_sees_it_end_once(end: str) -> None:
    """`as_completed` counts those that are done, and has itself told of the others, while it holds all conditions."""
    future: LightFuture[int] = LightFuture()
    done_before_it_was_held: list[bool] = []

    class Observed(threading.Condition):
        def __enter__(self) -> bool:
            entered = super().__enter__()
            done_before_it_was_held.append(future.done())
            return entered

    future._made_condition = Observed()
    arguments: dict[str, list[object]] = {"set_result": [1], "cancel": [], "set_exception": [ValueError("x")]}
    getattr(future, end)(*arguments[end])

    assert done_before_it_was_held == [False]
    assert future.done()


def test_the_collector_may_settle_another_one_while_a_condition_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: LightFuture[int] = LightFuture()
    waited_for: LightFuture[int] = LightFuture()
    waiting = threading.Thread(target=lambda: waited_for._condition, daemon=True)

    class Collecting(threading.Condition):
        def __init__(self, lock: Any = None) -> None:
            dropped.cancel()
            super().__init__(lock)

    monkeypatch.setattr(threading, "Condition", Collecting)
    waiting.start()
    joined(waiting)

    assert dropped.cancelled()


def test_a_signal_may_settle_another_one_at_any_moment() -> None:
    interrupted: LightFuture[int] = LightFuture()
    ended: list[bool] = []

    def interrupt() -> None:
        with future_module._lock:
            ended.append(interrupted.cancel())

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    joined(thread)
    assert ended == [True]


async def test_asyncio_waits_for_them_as_for_its_own() -> None:
    asyncio.get_running_loop().set_debug(True)  # what another thread does to its futures is an error then
    first: LightFuture[int] = LightFuture()
    second: LightFuture[int] = LightFuture()
    third: LightFuture[int] = LightFuture()
    threading.Timer(0.01, first.set_result, [1]).start()

    async def wait(**how: Any) -> tuple[set[Any], set[Any]]:
        futures: list[Any] = [first, second, third]
        return await asyncio.wait_for(asyncio.wait(futures, **how), patience(10))

    assert await wait(return_when=asyncio.FIRST_COMPLETED) == ({first}, {second, third})
    assert await wait(timeout=0) == ({first}, {second, third})
    assert second._done_callbacks == []
    second.cancel()
    threading.Timer(0.01, third.set_exception, [ValueError("x")]).start()
    assert await wait() == ({first, second, third}, set())
