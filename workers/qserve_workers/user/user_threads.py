"""The threads on which the `def` code of a replica runs.

Not `concurrent.futures`: its futures each have a lock and a condition, and are chained to one of asyncio's. For a `def`
that does nothing that takes longer than all else the replica does for the call.
"""

import asyncio
import contextlib
import inspect
import os
import sys
import threading
import traceback
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import Context, copy_context
from functools import partial
from queue import Empty, SimpleQueue
from types import AsyncGeneratorType, FunctionType, MethodType
from typing import Any, NamedTuple, NoReturn

from qserve.background import spawn
from qserve_workers.user.user_entry import UserCodeEscape, enter

_EXHAUSTED = object()


class UserThreads:
    """A few threads, which are started when they are needed. Belongs to the replica's event loop.

    Args:
        name: Prefix of the threads' names.
        count: How many there are. With one, user code needs no locks and may use things that stick to their thread.
    """

    def __init__(self, name: str, count: int) -> None:
        self._name = name
        self._most = count
        self._started = 0
        self._busy = 0
        """How many functions wait for a thread or run on one; also those whose caller has been cancelled meanwhile."""
        self._is_closed = False
        self._queue: _Queue = SimpleQueue()
        weakref.finalize(self, self._queue.put, None).atexit = False
        _open.add(self)

    async def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run a function on a thread, in a copy of the caller's context; an awaitable that it returns is awaited."""
        return await self._run(copy_context(), function, args, kwargs)

    async def run_and_keep(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Like `run`, and what the function sets in its context holds for the caller from then on."""
        context = copy_context()
        try:
            return await self._run(context, function, args, kwargs)
        finally:
            for variable, value in context.items():
                if variable.get(_EXHAUSTED) is not value:
                    variable.set(value)

    async def iterate(self, generator: Any) -> AsyncGenerator[Any, None]:
        """What a generator yields. A sync one advances on a thread, always in the same context; both are closed."""
        if isinstance(generator, AsyncGeneratorType):
            try:
                while (chunk := await enter(anext, generator, _EXHAUSTED)) is not _EXHAUSTED:
                    yield chunk
            finally:
                await enter(generator.aclose)
            return
        context, rests = copy_context(), asyncio.Event()
        rests.set()
        try:
            while (
                chunk := await enter(self._run, context, next, (generator, _EXHAUSTED), {}, rests)
            ) is not _EXHAUSTED:
                yield chunk
        finally:
            # In a task of its own: anyio cancels this one again and again, and a thread may not be free at once.
            await enter(asyncio.shield, spawn(self._close(generator, context, rests)))

    def endpoint(self, method: MethodType) -> Callable[..., Any]:
        """What a method does, on a thread, as an endpoint that FastAPI and Starlette await.

        Its signature and globals are those of the method, because FastAPI reads the parameters from them. So the code
        of the endpoint itself uses no globals.
        """
        closing = aclosing

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await self.run(method, *args, **kwargs)

        async def stream(*args: Any, **kwargs: Any) -> Any:
            async with closing(self.iterate(method(*args, **kwargs))) as chunks:
                async for chunk in chunks:
                    yield chunk

        does: Any = stream if inspect.isgeneratorfunction(method) else call
        function = inspect.unwrap(method.__func__)
        made = FunctionType(does.__code__, function.__globals__, function.__name__, None, does.__closure__)
        made.__dict__.update(vars(function), __signature__=inspect.signature(method))
        made.__doc__, made.__module__, made.__qualname__ = function.__doc__, function.__module__, function.__qualname__
        return made

    def close(self) -> None:
        """Take no more work, and drop what waits for a thread; what runs goes on."""
        with contextlib.suppress(Empty):
            while True:
                work = self._queue.get_nowait()
                if work is not None:
                    work.future.cancel()
                    work.settle(work.future, None, None)
        self.end_when_idle()

    def end_when_idle(self) -> None:
        """Take no more work, and let the threads end when they have done what was given to them. From any thread."""
        self._is_closed = True
        self._queue.put(None)

    async def _close(self, generator: Any, context: Context, rests: asyncio.Event) -> None:
        await rests.wait()  # nobody waits for its last step any more, which may still run
        await self._run(context, generator.close, (), {})

    async def _run(
        self, context: Context, function: Callable[..., Any], args: Any, kwargs: Any, rests: asyncio.Event | None = None
    ) -> Any:
        """Run a function in a context.

        Args:
            rests: Cleared now, and set once the function has ended or will not begin, also if nobody waits for it.
        """
        if self._is_closed:
            raise RuntimeError("this replica has ended, and runs nothing on its threads any more")
        settle = self._settle
        if rests is not None:
            rests.clear()
            settle = partial(self._settle, rests=rests)
        if self._busy >= self._started < self._most:
            threading.Thread(target=_work_off, args=(self._queue,), name=f"{self._name}_{self._started}").start()
            self._started += 1
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._busy += 1
        self._queue.put(_Work(loop, future, settle, context, function, args, kwargs))
        result = await future
        return await result if type(result) not in _NOT_AWAITED and inspect.isawaitable(result) else result

    def _settle(
        self,
        future: "asyncio.Future[Any]",
        result: Any,
        error: BaseException | None,
        rests: asyncio.Event | None = None,
    ) -> None:
        self._busy -= 1
        if rests is not None:
            rests.set()
        if future.done():
            return  # cancelled
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


class _Work(NamedTuple):
    """A function that is to run on a thread, and who is told what became of it."""

    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"
    settle: Callable[["asyncio.Future[Any]", Any, BaseException | None], None]
    context: Context
    function: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]


_Queue = SimpleQueue[_Work | None]
_NOT_AWAITED = frozenset({type(None), bool, int, float, str, bytes, list, tuple, dict})
"""To find out whether something else is awaited takes a while."""
_open: "weakref.WeakSet[UserThreads]" = weakref.WeakSet()


class _ThisProcess:
    forks = 0
    """How many forks of user code lead from the replica to it."""


def note_fork() -> None:
    """This process was forked by user code: where that ran on one of these threads, it ends when that has returned."""
    _ThisProcess.forks += 1


def _end_fork(error: BaseException | None) -> NoReturn:
    """End this process as Python does at the end of a program."""
    raised = error.raised if isinstance(error, UserCodeEscape) else error
    code = 0 if raised is None else 1
    if isinstance(raised, SystemExit) and isinstance(raised.code, int | None):
        code = raised.code or 0
    elif isinstance(raised, SystemExit):
        sys.stderr.write(f"{raised.code}\n")
    elif raised is not None:
        traceback.print_exception(raised)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code & 0xFF)


def _work_off(queue: _Queue) -> None:
    """Be a thread: do one piece of work after the other, until there is a None among them."""
    forks = _ThisProcess.forks
    while True:
        work = queue.get()
        if work is None:
            queue.put(None)  # for the next thread
            return
        result: Any = None
        error: BaseException | None = None
        if not work.future.cancelled():
            try:
                result = work.context.run(_run_sync, work.function, work.args, work.kwargs)
            except BaseException as exc:  # nothing may end the thread but what is meant to
                error = exc
        if _ThisProcess.forks != forks:  # what waits for work on this thread is another process
            _end_fork(error)
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            work.loop.call_soon_threadsafe(work.settle, work.future, result, error)
        del work, result, error  # while this thread waits, it keeps nothing alive


def _end_threads() -> None:
    for each in list(_open):
        each.end_when_idle()


# The interpreter waits for threads before it calls what is registered with `atexit`, so that would be too late.
threading._register_atexit(_end_threads)  # type: ignore[attr-defined]


_NO_LOOP = ("no running event loop", "There is no current event loop")
_WHERE_THE_LOOP_IS = (
    "`def` methods of a deployment run on a thread, so that they cannot block the event loop. What needs the event "
    "loop goes into an `async def`."
)


def _run_sync(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    try:
        return function(*args, **kwargs)
    except StopIteration as exc:
        # A future cannot carry it, and whoever awaited that future would wait for ever.
        raise RuntimeError("user code raised StopIteration") from exc
    except Exception as exc:
        if isinstance(exc, RuntimeError) and str(exc).startswith(_NO_LOOP):
            exc.add_note(_WHERE_THE_LOOP_IS)
        raise
    except BaseException as exc:
        # A CancelledError in the future of the executor would look like a cancellation of this call.
        raise UserCodeEscape(exc) from exc
