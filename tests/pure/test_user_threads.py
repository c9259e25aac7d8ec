"""The threads on which `def` code runs."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar

import pytest

from qserve_workers.user.user_entry import UserCodeEscape
from qserve_workers.user.user_threads import UserThreads
from tests.support.waiting import until

asked: ContextVar[str] = ContextVar("asked")


class Gate:
    """A function that waits on its thread until it may go on."""

    def __init__(self) -> None:
        self.entered = 0
        self.opened = threading.Event()

    def pass_through(self) -> str:
        self.entered += 1
        assert self.opened.wait(30)
        return threading.current_thread().name


@pytest.fixture
async def gate() -> AsyncIterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()


def running(name: str) -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith(name)]


async def test_what_a_function_returns_or_raises_comes_back_and_it_sees_the_callers_context() -> None:
    threads = UserThreads("some", 1)
    asked.set("by me")

    assert await threads.run(asked.get) == "by me"
    assert await threads.run(dict, a=1) == {"a": 1}
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 / 0)


async def test_what_a_function_sets_in_the_context_is_lost_or_kept() -> None:
    threads = UserThreads("some", 1)
    asked.set("by me")

    await threads.run(asked.set, "by it")
    assert asked.get() == "by me"
    await threads.run_and_keep(asked.set, "by it")
    assert asked.get() == "by it"


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()])
async def test_nothing_that_a_function_raises_ends_its_thread(raised: BaseException) -> None:
    def fail() -> None:
        raise raised

    threads = UserThreads("some", 1)
    thread = await threads.run(threading.current_thread)
    with pytest.raises(UserCodeEscape):
        await threads.run(fail)
    assert await threads.run(threading.current_thread) is thread


async def test_an_awaitable_that_a_function_returns_is_awaited() -> None:
    async def later() -> int:
        return 5

    assert await UserThreads("some", 1).run(later) == 5


async def test_as_many_run_at_once_as_there_may_be_threads(gate: Gate) -> None:
    threads = UserThreads("several", 2)
    tasks = [asyncio.create_task(threads.run(gate.pass_through)) for _ in range(5)]
    await until(lambda: gate.entered == 2)
    assert [each.name for each in running("several")] == ["several_0", "several_1"]

    gate.opened.set()
    assert set(await asyncio.gather(*tasks)) == {"several_0", "several_1"}


async def test_a_thread_is_started_only_where_all_are_busy() -> None:
    threads = UserThreads("seldom", 5)
    assert {await threads.run(lambda: threading.current_thread().name) for _ in range(20)} == {"seldom_0"}


async def test_a_function_whose_caller_is_cancelled_keeps_its_thread_and_the_next_one_gets_another(gate: Gate) -> None:
    threads = UserThreads("kept", 2)
    task = asyncio.create_task(threads.run(gate.pass_through))
    await until(lambda: gate.entered == 1)
    task.cancel()

    assert await threads.run(lambda: threading.current_thread().name) == "kept_1"


async def test_what_is_cancelled_while_it_waits_for_a_thread_does_not_run(gate: Gate) -> None:
    threads = UserThreads("one", 1)
    first = asyncio.create_task(threads.run(gate.pass_through))
    await until(lambda: gate.entered == 1)
    second = asyncio.create_task(threads.run(gate.pass_through))
    await asyncio.sleep(0)
    second.cancel()

    gate.opened.set()
    await first
    assert await threads.run(lambda: gate.entered) == 1


@pytest.mark.parametrize("count", [1, 2])
async def test_a_generator_that_nobody_reads_any_more_is_closed_once_its_step_has_ended(
    gate: Gate, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    closed = []

    def generate() -> Iterator[str]:
        try:
            yield "first"
            yield gate.pass_through()
        finally:
            closed.append(asked.get())

    threads = UserThreads("generating", count)
    asked.set("by me")
    chunks = threads.iterate(generate())
    assert await anext(chunks) == "first"
    second = asyncio.create_task(anext(chunks))
    await until(lambda: gate.entered == 1)
    second.cancel()
    if count > 1:
        assert await threads.run(lambda: len(closed)) == 0  # and no other thread waits for it

    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert closed == ["by me"]
    assert not caplog.records


async def test_a_generator_makes_no_step_that_was_not_begun_when_its_reader_left(gate: Gate) -> None:
    steps = []

    def generate() -> Iterator[int]:
        try:
            steps.append("first")
            yield 1
            steps.append("second")
            yield 2
        finally:
            steps.append("closed")

    threads = UserThreads("generating", 1)
    chunks = threads.iterate(generate())
    assert await anext(chunks) == 1
    before = asyncio.create_task(threads.run(gate.pass_through))
    await until(lambda: gate.entered == 1)
    second = asyncio.create_task(anext(chunks))
    await asyncio.sleep(0)
    second.cancel()
    gate.opened.set()
    await before
    with pytest.raises(asyncio.CancelledError):
        await second
    assert steps == ["first", "closed"]


async def test_at_the_end_what_runs_goes_on_and_what_waits_is_dropped(gate: Gate) -> None:
    threads = UserThreads("last", 1)
    first, second = (asyncio.create_task(threads.run(gate.pass_through)) for _ in range(2))
    await until(lambda: gate.entered == 1)
    await asyncio.sleep(0)

    threads.close()
    with pytest.raises(asyncio.CancelledError):
        await second
    with pytest.raises(RuntimeError, match="has ended"):
        await threads.run(int)
    gate.opened.set()
    assert await first == "last_0"
    await until(lambda: not running("last"))


async def test_threads_end_with_whoever_has_started_them() -> None:
    threads = UserThreads("dropped", 3)
    await threads.run(int)
    assert running("dropped")

    del threads
    gc.collect()
    await until(lambda: not running("dropped"))
