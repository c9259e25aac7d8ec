"""`@serve.batch`: when batches run, what they get, and what their callers get."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from qserve.batching import batch
from qserve.errors import QServeError
from tests.support.local_code import running
from tests.support.slowness import patience

# The decorator


def test_bare_and_parametrized_on_functions_and_methods() -> None:
    @batch
    async def bare(items: list[int]) -> list[int]:
        return items

    @batch(max_batch_size=10, batch_wait_timeout_s=0.0)
    async def given(items: list[int]) -> list[int]:
        return items

    class Model:
        @batch
        async def bare(self, items: list[int]) -> list[int]:
            return items

        @batch(max_batch_size=2)
        async def given(self, items: list[int]) -> list[int]:
            return items

    async def use() -> list[int]:
        model = Model()
        return [await bare(1), await given(2), await model.bare(3), await model.given(4)]

    assert asyncio.run(use()) == [1, 2, 3, 4]


@pytest.mark.parametrize("decorate", [batch, batch(max_batch_size=2)])
def test_only_async_functions_can_be_batched(decorate: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"Functions decorated with @serve\.batch must be 'async def'"):

        @decorate
        def not_async(items: list[int]) -> list[int]:
            return items

    with pytest.raises(TypeError, match="must be 'async def'"):

        class Model:
            @decorate
            def not_async(self, items: list[int]) -> list[int]:
                return items


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_batch_size": 1.0}, None),
        ({"max_batch_size": 1.1}, TypeError),
        ({"max_batch_size": "1"}, TypeError),
        ({"max_batch_size": 0}, ValueError),
        ({"max_batch_size": -1}, ValueError),
        ({"batch_wait_timeout_s": 0}, None),
        ({"batch_wait_timeout_s": 0.0}, None),
        ({"batch_wait_timeout_s": -0.1}, ValueError),
        ({"batch_wait_timeout_s": "a"}, TypeError),
    ],
)
def test_options_are_checked_at_decoration(options: dict[str, Any], error: type[Exception] | None) -> None:
    if error is None:
        assert batch(**options)
    else:
        with pytest.raises(error):
            batch(**options)


# When a batch runs


class Recorder:
    """Batches whatever comes and notes the sizes; the first batch waits for `go`."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.started = asyncio.Event()
        self.go = asyncio.Event()

    async def run(self, items: list[str]) -> list[str]:
        self.sizes.append(len(items))
        self.started.set()
        await self.go.wait()
        return [item.upper() for item in items]


async def test_without_a_wait_a_batch_is_whatever_is_queued() -> None:
    recorder = Recorder()
    batched = batch(max_batch_size=5)(recorder.run)
    first = asyncio.create_task(batched("a"))
    await recorder.started.wait()
    others = [asyncio.create_task(batched(item)) for item in "bc"]
    await asyncio.sleep(0)
    recorder.go.set()
    assert await asyncio.gather(first, *others) == ["A", "B", "C"]
    assert recorder.sizes == [1, 2]


async def test_a_batch_of_one_returns_at_once_however_long_the_wait() -> None:
    @batch(max_batch_size=1, batch_wait_timeout_s=1000)
    async def echo(items: list[int]) -> list[int]:
        return items

    assert await asyncio.wait_for(echo(1), timeout=patience(10)) == 1


async def test_a_batch_waits_until_it_is_full() -> None:
    sizes = []

    @batch(max_batch_size=3, batch_wait_timeout_s=1000)
    async def echo(items: list[int]) -> list[int]:
        sizes.append(len(items))
        return items

    two = [asyncio.create_task(echo(number)) for number in range(2)]
    done, _ = await asyncio.wait(two, timeout=0.05)
    assert not done
    assert await echo(2) == 2
    assert await asyncio.gather(*two) == [0, 1]
    assert sizes == [3]


async def test_a_batch_runs_when_the_wait_is_over() -> None:
    sizes = []

    @batch(max_batch_size=10, batch_wait_timeout_s=0.05)
    async def echo(items: list[int]) -> list[int]:
        sizes.append(len(items))
        return items

    assert list(await asyncio.gather(echo(1), echo(2))) == [1, 2]
    assert sizes == [2]


async def test_more_calls_than_fit_run_in_several_batches() -> None:
    sizes = []

    @batch(max_batch_size=4)
    async def echo(items: list[int]) -> list[int]:
        sizes.append(len(items))
        await asyncio.sleep(0)
        return items

    assert await asyncio.gather(*map(echo, range(10))) == list(range(10))
    assert sizes == [4, 4, 2]


# What callers get


async def test_an_exception_fails_every_call_of_its_batch_and_no_other() -> None:
    @batch(max_batch_size=2)
    async def divide(items: list[int]) -> list[float]:
        return [1 / item for item in items]

    results = await asyncio.gather(*map(divide, (1, 0, 2, 4)), return_exceptions=True)
    assert [type(result) for result in results] == [ZeroDivisionError, ZeroDivisionError, float, float]


async def test_a_result_of_another_length_is_refused() -> None:
    @batch
    async def shorter(items: list[int]) -> list[int]:
        return items[:-1]

    @batch
    async def no_list(items: list[int]) -> list[int]:
        return 3  # type: ignore[return-value]

    text = "The input list has length 1 but the returned list has length 0."
    with pytest.raises(QServeError, match=f"Batched function doesn't preserve batch size. {text}"):
        await shorter(1)
    with pytest.raises(TypeError):
        await no_list(1)


async def test_a_caller_that_gives_up_takes_nobody_with_it() -> None:
    recorder = Recorder()
    batched = batch(recorder.run)
    first = asyncio.create_task(batched("a"))
    await recorder.started.wait()
    gone, stays = asyncio.create_task(batched("gone")), asyncio.create_task(batched("stays"))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait([gone])
    recorder.go.set()
    assert list(await asyncio.gather(first, stays)) == ["A", "STAYS"]
    assert recorder.sizes == [1, 1]


async def test_several_parameters_each_become_a_list() -> None:
    @batch(max_batch_size=3)
    async def combine(a: list[int], b: list[int], *, c: list[int]) -> list[tuple[int, int, int]]:
        return list(zip(a, b, c, strict=True))

    calls = (combine(1, 2, c=3), combine(b=5, a=4, c=6), combine(7, c=9, b=8))
    assert list(await asyncio.gather(*calls)) == [(1, 2, 3), (4, 5, 6), (7, 8, 9)]


# Queues


async def test_each_instance_has_a_queue_of_its_own() -> None:
    class Model:
        def __init__(self) -> None:
            self.sizes: list[int] = []

        @batch
        async def run(self, items: list[int]) -> list[int]:
            self.sizes.append(len(items))
            return items

    one, two = Model(), Model()
    await asyncio.gather(one.run(1), two.run(2), one.run(3))
    assert [one.sizes, two.sizes] == [[2], [1]]


async def test_static_methods_are_functions() -> None:
    class Model:
        @staticmethod
        @batch
        async def run(items: list[str]) -> list[str]:
            return items

    assert await Model.run("x") == "x"
    assert await Model().run("y") == "y"


def test_it_works_on_one_event_loop_after_another() -> None:
    @batch
    async def echo(items: list[int]) -> list[int]:
        return items

    assert [asyncio.run(echo(number)) for number in range(3)] == [0, 1, 2]


async def test_concurrent_calls_of_a_replica_are_batched() -> None:
    class Model:
        def __init__(self) -> None:
            self.batches = 0

        @batch(max_batch_size=10, batch_wait_timeout_s=0.05)
        async def run(self, items: list[int]) -> list[int]:
            self.batches += 1
            return [item * 2 for item in items]

        async def __call__(self, item: int) -> int:
            return await self.run(item)

        def count(self) -> int:
            return self.batches

    async with running(Model) as replica:
        results = await asyncio.gather(*(replica.call("", number) for number in range(20)))
        assert results == [number * 2 for number in range(20)]
        assert await replica.call("count") == 2


async def test_batches_run_at_the_same_time_where_they_may_and_are_as_large_as_a_function_says() -> None:
    running, most, sizes = 0, 0, []

    @batch(max_batch_size=10, max_concurrent_batches=2, batch_size_fn=sum)
    async def double(numbers: list[int]) -> list[int]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        sizes.append(sum(numbers))
        for _ in range(3):
            await asyncio.sleep(0)
        running -= 1
        return [2 * each for each in numbers]

    assert await asyncio.gather(*(double(each) for each in (6, 4, 5, 5, 20, 1))) == [12, 8, 10, 10, 40, 2]
    assert sizes == [10, 10, 20, 1]
    assert most == 2


async def test_the_size_of_batches_can_be_set() -> None:
    sizes = []

    @batch(max_batch_size=10)
    async def same(numbers: list[int]) -> list[int]:
        sizes.append(len(numbers))
        return numbers

    settable: Any = same
    settable.set_max_batch_size(2)
    settable.set_batch_wait_timeout_s(0)
    await asyncio.gather(*(same(each) for each in range(4)))
    assert sizes == [2, 2]


@pytest.mark.parametrize("wait_s", [0, 1000])
async def test_a_size_that_cannot_be_told_fails_the_calls_that_wait_and_none_after_them(wait_s: float) -> None:
    def size_of(numbers: list[int]) -> int:
        return sum(100 // each for each in numbers)

    @batch(max_batch_size=10, batch_wait_timeout_s=wait_s, batch_size_fn=size_of)
    async def same(numbers: list[int]) -> list[int]:
        return numbers

    async with asyncio.timeout(patience(10)):
        outcomes = await asyncio.gather(same(0), same(0), return_exceptions=True)
        assert [type(each) for each in outcomes] == [ZeroDivisionError, ZeroDivisionError]
        assert await same(10) == 10


async def test_a_batch_is_full_when_its_size_is_what_a_function_says() -> None:
    @batch(max_batch_size=10, batch_wait_timeout_s=1000, batch_size_fn=sum)
    async def together(numbers: list[int]) -> list[int]:
        return [len(numbers)] * len(numbers)

    async with asyncio.timeout(patience(10)):
        assert await asyncio.gather(*map(together, (3, 3, 4))) == [3, 3, 3]


async def test_a_batch_whose_callers_have_all_left_does_not_run() -> None:
    recorder = Recorder()
    batched = batch(max_batch_size=1)(recorder.run)
    first = asyncio.create_task(batched("a"))
    await recorder.started.wait()
    gone = asyncio.create_task(batched("gone"))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait([gone])
    last = asyncio.create_task(batched("last"))
    await asyncio.sleep(0)
    recorder.go.set()
    assert list(await asyncio.gather(first, last)) == ["A", "LAST"]
    assert recorder.sizes == [1, 1]


async def test_a_batched_function_that_is_cancelled_cancels_its_calls_alone() -> None:
    @batch
    async def cancels(items: list[bool]) -> list[bool]:
        if items[0]:
            raise asyncio.CancelledError
        return items

    with pytest.raises(asyncio.CancelledError):
        await cancels(True)
    assert await cancels(False) is False


# Streams


@batch(max_batch_size=3, batch_wait_timeout_s=10)
async def count_to(limits: list[int]) -> AsyncIterator[list[object]]:
    for number in range(max(limits)):
        yield [number if number < limit else StopIteration for limit in limits]


async def parts_of(stream: AsyncIterator[Any]) -> list[Any]:
    return [part async for part in stream]


async def test_each_call_of_a_batched_generator_gets_its_own_parts() -> None:
    assert await asyncio.gather(*(parts_of(count_to(limit)) for limit in (1, 4, 2))) == [
        [0],
        [0, 1, 2, 3],
        [0, 1],
    ]
    assert inspect.isasyncgenfunction(count_to)  # replicas stream what it gives


async def test_a_batched_generator_of_a_script_ends_in_a_replica_too() -> None:
    class Model:
        @batch(max_batch_size=2)
        async def parts(self, limits: list[int]) -> AsyncIterator[list[object]]:
            for number in range(max(limits)):
                yield [number if number < limit else StopIteration for limit in limits]

        async def __call__(self, limit: int) -> list[object]:
            return [part async for part in self.parts(limit)]

    async with running(Model, travel=True) as replica:
        assert await replica.call("", 3) == [0, 1, 2]


async def test_a_batched_generator_that_raises_ends_every_stream_of_its_batch() -> None:
    class Model:
        @batch(max_batch_size=2, batch_wait_timeout_s=10)
        async def parts(self, items: list[int]) -> AsyncIterator[list[int]]:
            yield items
            raise KeyError("gone")

        @batch(max_batch_size=2, batch_wait_timeout_s=10)
        async def short(self, items: list[int]) -> AsyncIterator[list[int]]:
            yield items[:1]

    model, seen = Model(), list[int]()

    async def read(item: int) -> None:
        async for part in model.parts(item):
            seen.append(part)

    outcomes = await asyncio.gather(read(1), read(2), return_exceptions=True)
    assert [type(each) for each in outcomes] == [KeyError, KeyError]
    assert sorted(seen) == [1, 2]
    short = await asyncio.gather(parts_of(model.short(1)), parts_of(model.short(2)), return_exceptions=True)
    assert all("doesn't preserve batch size" in str(each) for each in short)


async def test_a_batched_generator_ends_when_all_its_readers_have_left() -> None:
    ended = asyncio.Event()

    @batch(max_batch_size=2, batch_wait_timeout_s=10)
    async def endless(items: list[str]) -> AsyncIterator[list[str]]:
        try:
            while True:
                yield items
                await asyncio.sleep(0)
        finally:
            ended.set()

    async def read_one(item: str) -> str:
        stream = endless(item)
        part = await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        return part

    assert list(await asyncio.gather(read_one("a"), read_one("b"))) == ["a", "b"]
    async with asyncio.timeout(patience(5)):
        await ended.wait()
