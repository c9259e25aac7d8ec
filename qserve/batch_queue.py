"""The queue of a batched function: it collects calls, and runs them together."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

from qserve.context import batch_hooks, batch_sizes, get_replica_context, shared_context
from qserve.errors import QServeError
from qserve.hooks import Batch, BatchHook, HookChain
from qserve.wire.messages import NO_META


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
            self._runner = self.loop.create_task(self._run_batches(), context=shared_context(self._model))
        return result

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self._waiting and not self._under_way and (self._runner is None or self._runner.done())

    async def _run_batches(self) -> None:
        # Ends when nothing waits, so that nothing is left behind on a loop that stops.
        while self._waiting:
            await self._wait_for_more()
            batch = self._next_batch()
            if not batch:
                continue
            # In a context of its own, so that it finds nothing there that another batch has set.
            task = self.loop.create_task(self._run_batch(batch), context=shared_context(self._model))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
            if len(self._under_way) >= self._terms.max_concurrent_batches:
                await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)

    def _next_batch(self) -> list[_Waiting]:
        """Take the calls of a batch; none if all that could be taken have given up or failed."""
        most, size_of = self._terms.max_batch_size, self._terms.batch_size_fn
        if size_of is not None:
            return self._next_of_size(most, size_of)
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), most))]
        return [call for call in batch if not call.result.done()]  # else its caller has given up

    def _next_of_size(self, most: int, size_of: Callable[[list[Any]], int]) -> list[_Waiting]:
        batch: list[_Waiting] = []
        while self._waiting:
            call = self._waiting[0]
            if not call.result.done():
                try:
                    is_too_large = size_of([each.arguments[0] for each in (*batch, call)]) > most
                except BaseException as exc:  # SystemExit too, which would end the loop here
                    is_too_large = True
                    if not batch:  # asked about alone, so that it is clear which call is to blame
                        _fail(call, exc)
                if is_too_large and batch:
                    break
                if not call.result.done():
                    batch.append(call)
            self._waiting.popleft()
        return batch

    def _is_full(self) -> bool:
        most, size_of = self._terms.max_batch_size, self._terms.batch_size_fn
        if size_of is None:
            return len(self._waiting) >= most
        try:
            return size_of([call.arguments[0] for call in self._waiting]) >= most
        except BaseException:  # `_next_of_size` finds out which call it is about
            return True

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
            results = in_order(results, len(batch), "return")
            if len(results) != len(batch):
                raise QServeError(
                    "Batched function doesn't preserve batch size. "
                    f"The input list has length {len(batch)} but the returned list has length {len(results)}."
                )
        except BaseException as exc:  # SystemExit too, which would end the loop here
            _forget_this_frame(exc)
            for call in batch:
                if isinstance(exc, asyncio.CancelledError):
                    call.result.cancel()
                else:
                    _fail(call, exc)
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return
        for call, result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                _fail(call, result)
            elif not call.result.done():
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


def in_order(results: Any, count: int, verb: str) -> list[Any]:
    """The results of a batch as a list.

    Args:
        count: How many inputs the batch has, for the error.
        verb: What the batched function does to give results, for the error.

    Raises:
        TypeError: They have no order, or are no results of several inputs at all.
    """
    kind = type(results)
    is_series = hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")
    is_table = hasattr(kind, "columns") and hasattr(kind, "shape")  # whose columns would be taken for the results
    if isinstance(results, str | bytes | Mapping | Set) or is_table or not is_series:
        raise TypeError(
            f"A batched function has to {verb} a list with one result for each of its inputs ({count}), in their "
            f"order, and not a value of type {kind.__name__}."
        )
    return list(results)


def _forget_this_frame(error: BaseException) -> None:
    """Take the frame that has caught the error out of it: its calls hold the error, which then would hold them."""
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next


def _fail(call: _Waiting, error: BaseException) -> None:
    if call.result.done():
        return
    if isinstance(error, StopIteration):  # which no future takes
        error = RuntimeError(f"a batched function, or its batch_size_fn, raised {error!r}")
    call.result.set_exception(error)
