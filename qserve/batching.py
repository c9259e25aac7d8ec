"""`@serve.batch`: calls made one by one run together, as one call with lists."""

import asyncio
import inspect
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import wraps
from inspect import BoundArguments, Parameter
from typing import Any, Protocol, TypeVar, cast, overload

from qserve.batch_queue import BatchQueue, BatchTerms, in_order
from qserve.context import model_here
from qserve.errors import QServeError
from qserve.user_code.user_objects import kept_in

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")


class BatchDecorator(Protocol):
    """The decorator that `@serve.batch(...)` returns."""

    @overload
    def __call__(
        self, function: Callable[[list[T]], Coroutine[Any, Any, list[R]]], /
    ) -> Callable[[T], Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(
        self, function: Callable[[S, list[T]], Coroutine[Any, Any, list[R]]], /
    ) -> Callable[[S, T], Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(self, function: Callable[[list[T]], AsyncIterator[list[R]]], /) -> Callable[[T], AsyncIterator[R]]: ...
    @overload
    def __call__(
        self, function: Callable[[S, list[T]], AsyncIterator[list[R]]], /
    ) -> Callable[[S, T], AsyncIterator[R]]: ...
    @overload
    def __call__(
        self, function: Callable[..., Coroutine[Any, Any, Any]] | Callable[..., AsyncIterator[Any]], /
    ) -> Callable[..., Any]: ...


@overload
def batch(function: Callable[[list[T]], Coroutine[Any, Any, list[R]]], /) -> Callable[[T], Coroutine[Any, Any, R]]: ...
@overload
def batch(
    function: Callable[[S, list[T]], Coroutine[Any, Any, list[R]]], /
) -> Callable[[S, T], Coroutine[Any, Any, R]]: ...
@overload
def batch(function: Callable[[list[T]], AsyncIterator[list[R]]], /) -> Callable[[T], AsyncIterator[R]]: ...
@overload
def batch(function: Callable[[S, list[T]], AsyncIterator[list[R]]], /) -> Callable[[S, T], AsyncIterator[R]]: ...
@overload
def batch(
    function: Callable[..., Coroutine[Any, Any, Any]] | Callable[..., AsyncIterator[Any]], /
) -> Callable[..., Any]: ...
@overload
def batch(
    *,
    max_batch_size: int = 10,
    batch_wait_timeout_s: float = 0.0,
    max_concurrent_batches: int = 1,
    batch_size_fn: Callable[[list[Any]], int] | None = None,
) -> BatchDecorator: ...
def batch(
    function: Any = None,
    /,
    *,
    max_batch_size: float = 10,
    batch_wait_timeout_s: float = 0.0,
    max_concurrent_batches: int = 1,
    batch_size_fn: Callable[[list[Any]], int] | None = None,
) -> Any:
    """Run many calls of an `async def` function or method as one call with a list in place of each argument.

    The function returns a list of as many results, in the same order; its callers pass and get single values. What it
    raises, each of its callers gets; an exception in the place of a result is raised in that call only. Each instance
    has a queue of its own, and one for each model (`multiplexed`). A batch belongs to no single call, and sees no
    context variables that one of them has set. The function that comes out has `set_max_batch_size` and
    `set_batch_wait_timeout_s`, for `reconfigure`.

    An `async def` generator yields lists, each with the next part for every call; `StopIteration` in the place of a
    part ends that call's stream. Its callers get an asynchronous iterator of their own parts.

    Args:
        max_batch_size: Run at once with so many calls.
        batch_wait_timeout_s: Wait so long for a full batch; 0: run what is there.
        max_concurrent_batches: How many batches of a queue run at the same time.
        batch_size_fn: Given the first arguments of the calls of a batch, how large it is; else their number.

    Raises:
        TypeError, ValueError: Not an `async def` function, or an option is not what it should be.
    """
    if not isinstance(max_concurrent_batches, int) or max_concurrent_batches < 1:
        raise ValueError("max_concurrent_batches must be an integer >= 1")
    size, wait_s = _checked_size(max_batch_size), _checked_wait(batch_wait_timeout_s)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        terms = BatchTerms(size, wait_s, max_concurrent_batches, batch_size_fn)
        if inspect.isasyncgenfunction(function):
            return _BatchedStream(function, terms).as_function()
        if not inspect.iscoroutinefunction(function):
            raise TypeError("Functions decorated with @serve.batch must be 'async def'")
        return _Batched(function, terms).as_function()

    return decorate if function is None else decorate(function)


def _checked_size(value: float) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int):
        raise TypeError("max_batch_size must be integer >= 1")
    if value < 1:
        raise ValueError("max_batch_size must be an integer >= 1")
    return value


def _checked_wait(value: float) -> float:
    if not isinstance(value, int | float):
        raise TypeError("batch_wait_timeout_s must be a float >= 0")
    if value < 0:
        raise ValueError("batch_wait_timeout_s must be a float >= 0")
    return value


class _Batched:
    """One decorated function: finds the queue of a call, and puts it there."""

    def __init__(self, function: Callable[..., Any], terms: BatchTerms) -> None:
        self._function = function
        self._terms = terms
        self._queues: dict[str, BatchQueue] = {}
        in_class_body, _, self._name = function.__qualname__.rpartition(".")
        self._may_be_method = bool(in_class_body) and not in_class_body.endswith("<locals>")
        self._signature = inspect.signature(function)
        kinds = {each.kind for each in self._signature.parameters.values()}
        if kinds & {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}:
            raise TypeError("Functions decorated with @serve.batch may not take *args or **kwargs")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_queues": {}}  # what waits stays where it is when code is sent

    def as_function(self) -> Callable[..., Any]:
        """The function that replaces the decorated one."""

        call: Any = wraps(self._function)(self._make_call())

        def set_max_batch_size(size: float) -> None:
            self._terms.max_batch_size = _checked_size(size)

        def set_batch_wait_timeout_s(seconds: float) -> None:
            self._terms.batch_wait_timeout_s = _checked_wait(seconds)

        call.set_max_batch_size = set_max_batch_size
        call.set_batch_wait_timeout_s = set_batch_wait_timeout_s
        return cast(Callable[..., Any], call)

    def _make_call(self) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_method(args):
                return await self._queue(args[0]).put(self._row(args, kwargs, skip=1))
            return await self._queue(None).put(self._row(args, kwargs, skip=0))

        return call

    def _is_method(self, args: tuple[Any, ...]) -> bool:
        # The class has an attribute of that name, so the first argument is `self`; a staticmethod's is not.
        return self._may_be_method and bool(args) and hasattr(type(args[0]), self._name)

    def _row(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, skip: int) -> tuple[Any, ...]:
        """The arguments of one call, one for each parameter."""
        if not kwargs and len(args) == len(self._signature.parameters):
            return args[skip:]
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return tuple(bound.arguments.values())[skip:]

    def _queue(self, instance: Any) -> BatchQueue:
        queues = self._queues if instance is None else self._queues_in(instance)
        model, loop = model_here(), asyncio.get_running_loop()
        queue = queues.get(model)
        if queue is None or queue.loop is not loop:
            # Callers name models as they please, so a queue stays only while there is something in it.
            for name, each in list(queues.items()):
                if each.is_idle or each.loop is not loop:
                    del queues[name]
            queue = queues[model] = BatchQueue(self._runner(instance), self._terms, self._function.__name__, model)
        return queue

    def _queues_in(self, instance: Any) -> dict[str, BatchQueue]:
        kept = kept_in(instance, "@serve.batch")
        queues: dict[str, BatchQueue] | None = kept.get(self)  # not by its name, which a method of a base class has too
        if queues is None:
            queues = kept[self] = {}
        return queues

    def _runner(self, instance: Any) -> Callable[..., Awaitable[Sequence[Any]]]:
        first = () if instance is None else (instance,)
        names = list(self._signature.parameters)

        def run(*columns: list[Any]) -> Awaitable[Sequence[Any]]:
            given = OrderedDict(zip(names, (*first, *columns), strict=True))
            bound = BoundArguments(self._signature, given)
            results: Awaitable[Sequence[Any]] = self._function(*bound.args, **bound.kwargs)
            return results

        return run


class _End:
    """Stands for the end of a stream. A class, which is the same one where a pickled function refers to it."""


class _Share:
    """The parts of a batched stream that are for one call."""

    def __init__(self) -> None:
        self.parts: asyncio.Queue[Any] = asyncio.Queue()
        self.is_open = True
        self.error: Exception | None = None

    def close(self, error: Exception | None = None) -> None:
        """There are no more parts, or nobody reads them; or the error comes in their place."""
        self.is_open = False
        self.error = self.error or error
        self.parts.put_nowait(_End)

    def batch_ended(self, _: object) -> None:
        """There are no more parts for any call."""
        self.close()


class _BatchedStream(_Batched):
    """A decorated asynchronous generator: each call takes part in a batch with a share that the batch puts parts in."""

    def _make_call(self) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            instance = args[0] if self._is_method(args) else None
            row = self._row(args, kwargs, skip=int(instance is not None))
            share = _Share()
            ended = self._queue(instance).put((*row, share))
            ended.add_done_callback(share.batch_ended)
            try:
                while (part := await share.parts.get()) is not _End:
                    yield part
                if share.error is not None:
                    raise share.error
                if ended.done():
                    ended.result()  # raises what the batch has raised
            finally:
                share.is_open = False
                ended.cancel()
                del share, ended  # else an error would hold this frame, and it the error

        return call

    def _runner(self, instance: Any) -> Callable[..., Awaitable[Sequence[Any]]]:
        start = super()._runner(instance)

        async def run(*columns: Any) -> Sequence[Any]:
            shares: list[_Share] = columns[-1]
            stream: Any = start(*columns[:-1])
            try:
                async for parts in stream:
                    _hand_out(parts, shares)
                    if not any(share.is_open for share in shares):
                        break
            finally:
                await stream.aclose()
            return shares

        return run


def _hand_out(yielded: object, shares: Sequence[_Share]) -> None:
    parts = in_order(yielded, len(shares), "yield")
    if len(parts) != len(shares):
        raise QServeError(
            "Batched generator doesn't preserve batch size. "
            f"The input list has length {len(shares)} but a list that it yielded has length {len(parts)}."
        )
    for part, share in zip(parts, shares, strict=True):
        if part is StopIteration or part is StopAsyncIteration:
            share.close()
        elif isinstance(part, Exception):
            share.close(part)
        elif share.is_open:
            share.parts.put_nowait(part)
