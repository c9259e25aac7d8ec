"""`@serve.batch`: calls made one by one run together, as one call with lists."""

import asyncio
import inspect
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import BoundArguments, Parameter
from typing import Any, NamedTuple, Protocol, TypeVar, overload

from qserve.context import batch_hooks, batch_model, batch_sizes, current_call, get_replica_context
from qserve.errors import QServeError
from qserve.hooks import Batch, BatchHook, HookChain
from qserve.wire.messages import NO_META

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")


class _Waiting(NamedTuple):
    arguments: tuple[Any, ...]
    result: asyncio.Future[Any]
    meta: Mapping[str, Any]
    """What the hooks say of the call."""


@dataclass
class BatchTerms:
    """How batches are made; see `batch`."""

    max_batch_size: int
    batch_wait_timeout_s: float
    max_concurrent_batches: int
    batch_size_fn: Callable[[list[Any]], int] | None


class BatchQueue:
    """Collects the calls of one function, or of one instance's method, on the running event loop.

    Not thread-safe.

    Args:
        run: Runs a batch, given one list per parameter; gives the results in the same order.
        terms: How batches are made; may change at any time.
        name: What hooks are told that the function is called.
        model: The model that all calls are for, if they are for one.
    """

    def __init__(
        self,
        run: Callable[..., Awaitable[Sequence[Any]]],
        terms: BatchTerms,
        name: str = "",
        model: str = "",
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._run = run
        self._terms = terms
        self._model = model
        self._under_way: set[asyncio.Task[None]] = set()
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._name = name
        self._hooks = batch_hooks()
        self._sizes = batch_sizes()
        self._runner: asyncio.Task[None] | None = None

    def put(self, arguments: tuple[Any, ...]) -> asyncio.Future[Any]:
        """Add one call; the future gets its result."""
        result = self.loop.create_future()
        meta = NO_META if self._hooks is None else self._hooks.joins()
        self._waiting.append(_Waiting(arguments, result, meta))
        self._arrived.set()
        if self._runner is None or self._runner.done():
            self._runner = self.loop.create_task(self._run_batches())
        return result

    async def _run_batches(self) -> None:
        current_call.set(None)  # a batch belongs to no single call
        batch_model.set(self._model)
        # Ends when nothing waits, so that nothing is left behind on a loop that stops.
        while self._waiting:
            await self._wait_for_more()
            batch = [self._waiting.popleft() for _ in range(self._size_of_next())]
            batch = [call for call in batch if not call.result.done()]  # its caller has given up
            if not batch:
                continue
            if self._terms.max_concurrent_batches == 1:
                await self._run_batch(batch)
                continue
            task = asyncio.create_task(self._run_batch(batch))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
            if len(self._under_way) >= self._terms.max_concurrent_batches:
                await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)

    def _size_of_next(self) -> int:
        """How many of the calls that wait fit into a batch; at least one."""
        most, size_of = self._terms.max_batch_size, self._terms.batch_size_fn
        if size_of is None:
            return min(len(self._waiting), most)
        items: list[Any] = []
        for call in self._waiting:
            items.append(call.arguments[0])
            if size_of(items) > most:
                return max(1, len(items) - 1)
        return len(items)

    def _is_full(self) -> bool:
        most, size_of = self._terms.max_batch_size, self._terms.batch_size_fn
        if size_of is None:
            return len(self._waiting) >= most
        return size_of([call.arguments[0] for call in self._waiting]) >= most

    async def _wait_for_more(self) -> None:
        if self._terms.batch_wait_timeout_s == 0:
            return
        try:
            async with asyncio.timeout(self._terms.batch_wait_timeout_s):
                while not self._is_full():
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            pass

    async def _run_batch(self, batch: list[_Waiting]) -> None:
        self._sizes[len(batch)] += 1
        try:
            columns = map(list, zip(*(call.arguments for call in batch), strict=True))
            if self._hooks is None:
                results = await self._run(*columns)
            else:
                results = await self._run_with_hooks(self._hooks, [call.meta for call in batch], *columns)
            if len(results) != len(batch):
                raise QServeError(
                    "Batched function doesn't preserve batch size. "
                    f"The input list has length {len(batch)} but the returned list has length {len(results)}."
                )
        except BaseException as exc:  # SystemExit too, which would end the loop here
            for call in batch:
                if isinstance(exc, asyncio.CancelledError):
                    call.result.cancel()
                elif not call.result.done():
                    call.result.set_exception(exc)
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return
        for call, result in zip(batch, results, strict=True):
            if not call.result.done():
                call.result.set_result(result)

    async def _run_with_hooks(
        self, hooks: HookChain[BatchHook], calls: list[Mapping[str, Any]], *columns: list[Any]
    ) -> Sequence[Any]:
        batch = Batch(get_replica_context().deployment, self._name, calls)
        states = hooks.before(batch)
        try:
            results = await self._run(*columns)
        except BaseException as exc:
            hooks.error(batch, states, exc)
            raise
        hooks.after(batch, states)
        return results


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
    def __call__(self, function: Callable[..., Coroutine[Any, Any, Any]], /) -> Callable[..., Any]: ...


@overload
def batch(function: Callable[[list[T]], Coroutine[Any, Any, list[R]]], /) -> Callable[[T], Coroutine[Any, Any, R]]: ...
@overload
def batch(
    function: Callable[[S, list[T]], Coroutine[Any, Any, list[R]]], /
) -> Callable[[S, T], Coroutine[Any, Any, R]]: ...
@overload
def batch(function: Callable[..., Coroutine[Any, Any, Any]], /) -> Callable[..., Any]: ...
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
    raises, each of its callers gets. Each instance has a queue of its own, and one for each model (`multiplexed`). The
    function that comes out has `set_max_batch_size` and `set_batch_wait_timeout_s`, for `reconfigure`.

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
        if not inspect.iscoroutinefunction(function):
            raise TypeError("Functions decorated with @serve.batch must be 'async def'")
        return _Batched(function, BatchTerms(size, wait_s, max_concurrent_batches, batch_size_fn)).as_function()

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
        self._key = f"_qserve_batches_of_{function.__name__}"
        in_class_body, _, self._name = function.__qualname__.rpartition(".")
        self._may_be_method = bool(in_class_body) and not in_class_body.endswith("<locals>")
        self._signature = inspect.signature(function)
        kinds = {each.kind for each in self._signature.parameters.values()}
        if kinds & {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}:
            raise TypeError("Functions decorated with @serve.batch may not take *args or **kwargs")

    def as_function(self) -> Callable[..., Any]:
        """The function that replaces the decorated one."""

        @wraps(self._function)
        async def call(*args: Any, **kwargs: Any) -> Any:
            # The class has an attribute of that name, so the first argument is `self`; a staticmethod's is not.
            if self._may_be_method and args and hasattr(type(args[0]), self._name):
                return await self._queue(args[0]).put(self._row(args, kwargs, skip=1))
            return await self._queue(None).put(self._row(args, kwargs, skip=0))

        def set_max_batch_size(size: float) -> None:
            self._terms.max_batch_size = _checked_size(size)

        def set_batch_wait_timeout_s(seconds: float) -> None:
            self._terms.batch_wait_timeout_s = _checked_wait(seconds)

        setters: Any = call
        setters.set_max_batch_size = set_max_batch_size
        setters.set_batch_wait_timeout_s = set_batch_wait_timeout_s
        return call

    def _row(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, skip: int) -> tuple[Any, ...]:
        """The arguments of one call, one for each parameter."""
        if not kwargs and len(args) == len(self._signature.parameters):
            return args[skip:]
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return tuple(bound.arguments.values())[skip:]

    def _queue(self, instance: Any) -> BatchQueue:
        queues = self._queues if instance is None else instance.__dict__
        call = current_call.get()
        model = call.model_id if call is not None else ""
        key = self._key + model
        queue: BatchQueue | None = queues.get(key)
        if queue is None or queue.loop is not asyncio.get_running_loop():
            queue = queues[key] = BatchQueue(self._runner(instance), self._terms, self._function.__name__, model)
        return queue

    def _runner(self, instance: Any) -> Callable[..., Awaitable[Sequence[Any]]]:
        first = () if instance is None else (instance,)
        names = list(self._signature.parameters)

        def run(*columns: list[Any]) -> Awaitable[Sequence[Any]]:
            given = OrderedDict(zip(names, (*first, *columns), strict=True))
            bound = BoundArguments(self._signature, given)
            results: Awaitable[Sequence[Any]] = self._function(*bound.args, **bound.kwargs)
            return results

        return run
