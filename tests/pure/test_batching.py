"""`@serve.batch`: when batches run, what they get, and what their callers get."""

import asyncio
import contextlib
import gc
import inspect
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest

from qserve import serve
from qserve.batch_queue import BatchQueue
from qserve.batching import batch
from qserve.context import CallInfo, current_call
from qserve.errors import QServeError
from tests.support.local_code import running
from tests.support.slowness import patience
from tests.support.waiting import until

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


async def test_an_exception_in_the_place_of_a_result_is_raised_in_that_call_only() -> None:
    @batch(max_batch_size=3)
    async def divide(items: list[int]) -> list[object]:
        return [1 / item if item else ZeroDivisionError(item) for item in items]

    calls = [asyncio.create_task(divide(item)) for item in (1, 0, 2)]
    await asyncio.wait(calls)
    assert [type(call.exception()) for call in calls] == [type(None), ZeroDivisionError, type(None)]


async def test_a_result_of_another_length_is_refused() -> None:
    @batch
    async def shorter(items: list[int]) -> list[int]:
        return items[:-1]

    text = "The input list has length 1 but the returned list has length 0."
    with pytest.raises(QServeError, match=f"Batched function doesn't preserve batch size. {text}"):
        await shorter(1)


@pytest.mark.parametrize("result", [None, 3, "a", b"a", {"a": 1}, {1}], ids=repr)
async def test_what_is_no_list_of_results_is_refused(result: Any) -> None:
    @batch
    async def returns(items: list[int]) -> list[int]:
        return result  # type: ignore[no-any-return]

    @batch
    async def yields(items: list[int]) -> AsyncIterator[list[int]]:
        yield result

    kind = type(result).__name__
    with pytest.raises(TypeError, match=rf"has to return a list with one result .*\(1\).* not a value of type {kind}"):
        await returns(1)
    with pytest.raises(TypeError, match=f"has to yield a list with .* not a value of type {kind}"):
        await anext(yields(1))


async def test_results_may_be_anything_that_has_an_order() -> None:
    kinds: list[Callable[[list[int]], Any]] = [tuple, np.array, iter, lambda items: (item for item in items)]

    @batch(max_batch_size=2)
    async def echo(items: list[int]) -> list[int]:
        return kinds[-1](items)  # type: ignore[no-any-return]

    while kinds:
        assert list(await asyncio.gather(echo(1), echo(2))) == [1, 2]
        kinds.pop()


class Input:
    """Something whose memory is to be free when nobody needs it."""


@batch(max_batch_size=2)
async def raises(items: list[Input]) -> list[int]:
    raise ValueError


@batch(max_batch_size=2)
async def gives_too_many(items: list[Input]) -> list[int]:
    return [1, 2, 3]


@batch(max_batch_size=2)
async def stream_raises(items: list[Input]) -> AsyncIterator[list[int]]:
    yield [1] * len(items)
    raise ValueError


@batch(max_batch_size=2)
async def stream_gives_errors(items: list[Input]) -> AsyncIterator[list[Any]]:
    yield [ValueError() for _ in items]


@pytest.mark.parametrize("batched", [raises, gives_too_many, stream_raises, stream_gives_errors])
async def test_a_failed_batch_keeps_none_of_its_inputs(batched: Callable[[Input], Any]) -> None:
    """Not even until the garbage collector comes: they may be the memory that was too little."""
    inputs: weakref.WeakSet[Input] = weakref.WeakSet()

    async def call() -> None:
        given = Input()
        inputs.add(given)
        with contextlib.suppress(ValueError, QServeError):
            if inspect.isasyncgenfunction(batched):
                async for _ in batched(given):
                    pass
            else:
                await batched(given)

    gc.disable()
    try:
        await asyncio.gather(call(), call())
        await until(lambda: not inputs)
    finally:
        gc.enable()


async def test_the_columns_of_a_table_are_no_results() -> None:
    class DataFrame:
        """Gives the names of its columns, as that of pandas does."""

        columns = ("first", "second")
        shape = (2, 2)

        def __iter__(self) -> Iterator[str]:
            return iter(self.columns)

    @batch(max_batch_size=2)
    async def tabulate(items: list[int]) -> list[str]:
        return DataFrame()  # type: ignore[return-value]

    errors = await asyncio.gather(tabulate(1), tabulate(2), return_exceptions=True)
    assert ["not a value of type DataFrame" in str(error) for error in errors] == [True, True]


async def test_nobody_waits_for_a_result_that_a_series_does_not_give() -> None:
    class Series:
        """Has a length of two, and gives only one."""

        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[str]:
            yield "first"

    @batch(max_batch_size=2)
    async def tabulate(items: list[int]) -> list[str]:
        return Series()  # type: ignore[return-value]

    async with asyncio.timeout(patience(20)):
        errors = await asyncio.gather(tabulate(1), tabulate(2), return_exceptions=True)
    assert ["length 2 but the returned list has length 1" in str(error) for error in errors] == [True, True]


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


async def test_a_method_may_call_that_of_its_base_class() -> None:
    class Base:
        @batch
        async def run(self, items: list[int]) -> list[int]:
            return [2 * item for item in items]

    class Sub(Base):
        @batch
        async def run(self, items: list[int]) -> list[int]:
            return [1 + each for each in await asyncio.gather(*map(super().run, items))]

    async with asyncio.timeout(patience(10)):
        assert await Sub().run(5) == 11


async def test_nothing_is_left_of_the_models_that_callers_have_named() -> None:
    class Model:
        @batch
        async def run(self, items: list[int]) -> list[int]:
            return items

    model = Model()

    async def call(name: str) -> None:
        current_call.set(CallInfo("id", model_id=name))
        await model.run(1)

    for number in range(50):
        await asyncio.create_task(call(f"model {number}"))
    gc.collect()
    assert sum(isinstance(each, BatchQueue) and each._model.startswith("model ") for each in gc.get_objects()) == 1


async def test_a_batch_within_a_batch_is_for_the_same_model() -> None:
    class Model:
        @batch
        async def outer(self, items: list[int]) -> list[str]:
            return list(await asyncio.gather(*map(self.inner, items)))

        @batch
        async def inner(self, items: list[int]) -> list[str]:
            return [serve.get_multiplexed_model_id() for _ in items]

    model = Model()

    async def call(name: str) -> str:
        current_call.set(CallInfo("id", model_id=name))
        return await model.outer(1)

    assert list(await asyncio.gather(call("a"), call("b"))) == ["a", "b"]


async def test_an_instance_without_room_for_a_queue_is_told_of() -> None:
    class Model:
        __slots__ = ()

        @batch
        async def run(self, items: list[int]) -> list[int]:
            return items

    with pytest.raises(TypeError, match=r"@serve\.batch keeps its state in the instance.* Add '__dict__' to"):
        await Model().run(1)


async def test_a_function_that_has_run_can_be_sent_to_a_replica() -> None:
    @batch
    async def double(items: list[int]) -> list[int]:
        return [2 * each for each in items]

    async def function(number: int) -> int:
        return await double(number)

    assert await function(1) == 2
    async with running(function, travel=True) as replica:
        assert await replica.call("", 2) == 4


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
async def test_a_size_that_cannot_be_told_fails_the_call_that_it_is_about_and_no_other(wait_s: float) -> None:
    def size_of(numbers: list[int]) -> int:
        if 13 in numbers:
            return next(iter(()))
        return sum(100 // each for each in numbers)

    sizes = []

    @batch(max_batch_size=10, batch_wait_timeout_s=wait_s, batch_size_fn=size_of)
    async def same(numbers: list[int]) -> list[int]:
        sizes.append(len(numbers))
        return numbers

    async with asyncio.timeout(patience(10)):
        outcomes = await asyncio.gather(*map(same, (50, 50, 0, 50, 13, 0, 50, 10)), return_exceptions=True)
        kinds = [type(each) if isinstance(each, Exception) else each for each in outcomes]
        assert kinds == [50, 50, ZeroDivisionError, 50, RuntimeError, ZeroDivisionError, 50, 10]
        assert await same(10) == 10


async def test_calls_whose_size_cannot_be_told_together_run_one_after_another() -> None:
    def size_of(items: list[str]) -> int:
        if len({type(each) for each in items}) > 1:
            raise TypeError("items of several kinds")
        return len(items)

    sizes = []

    @batch(max_batch_size=10, batch_size_fn=size_of)
    async def same(items: list[object]) -> list[object]:
        sizes.append(len(items))
        return items

    assert await asyncio.gather(*map(same, ("a", "b", 1, 2, 3))) == ["a", "b", 1, 2, 3]
    assert sizes == [2, 3]


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


async def test_a_batch_that_cancels_its_task_ends_no_other_batch() -> None:
    @batch(max_batch_size=1)
    async def cancels(items: list[bool]) -> list[bool]:
        task = asyncio.current_task()
        assert task is not None
        if items[0]:
            task.cancel()
        await asyncio.sleep(0)
        return items

    async with asyncio.timeout(patience(10)):
        outcomes = await asyncio.gather(cancels(True), cancels(False), return_exceptions=True)
    assert [type(each) for each in outcomes] == [asyncio.CancelledError, bool]


# What a batch finds in its context

WHO = ContextVar("WHO", default="nobody")


async def test_a_batch_sees_what_the_constructor_has_set_and_nothing_of_its_calls_or_of_other_batches() -> None:
    class Model:
        def __init__(self) -> None:
            WHO.set("constructor")

        @batch(max_batch_size=1)
        async def run(self, items: list[str]) -> list[tuple[str, object]]:
            found = WHO.get(), current_call.get()
            WHO.set(f"batch of {items}")
            return [found]

        @batch(max_batch_size=2)
        async def stream(self, items: list[str]) -> AsyncIterator[list[str]]:
            yield [WHO.get() for _ in items]

        async def __call__(self, name: str) -> list[object]:
            WHO.set(name)
            current_call.set(CallInfo(name))
            return [await self.run(name), [part async for part in self.stream(name)]]

    async with running(Model) as replica:
        calls = [asyncio.create_task(replica.call("", name)) for name in "abc"]
        assert await asyncio.gather(*calls) == [[("constructor", None), ["constructor"]]] * 3


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


async def test_an_exception_in_the_place_of_a_part_ends_that_stream_only() -> None:
    @batch(max_batch_size=2, batch_wait_timeout_s=10)
    async def parts(items: list[int]) -> AsyncIterator[list[object]]:
        yield list(items)
        yield [item if item else KeyError(item) for item in items]

    async def read(item: int) -> list[object]:
        stream = parts(item)
        first = await anext(stream)
        try:
            return [first, await anext(stream)]
        except KeyError:
            return [first, KeyError]

    assert list(await asyncio.gather(read(0), read(1))) == [[0, KeyError], [1, 1]]


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
