"""The one way into user code: whatever it raises ends what was asked of it, and nothing else.

`except Exception` lets some of what user code raises pass: the panics of Rust extensions, `SystemExit`,
`GeneratorExit`, a `CancelledError` that nobody asked for. Two of these would end the event loop, and with it every
other call of the replica. Here they become exceptions like all others.
"""

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import Context, copy_context
from types import AsyncGeneratorType, FunctionType, MethodType
from typing import Any, TypeVar

from qserve.background import spawn
from qserve.wire.exceptions import text_of

Result = TypeVar("Result")

_EXHAUSTED = object()


class UserCodeEscape(RuntimeError):
    """User code raised something that is no `Exception`; this one is raised in its place.

    Attributes:
        raised: What user code raised.
    """

    def __init__(self, raised: BaseException) -> None:
        super().__init__(f"user code raised {type(raised).__name__}({text_of(raised)}), which ends this call only")
        self.raised = raised


async def enter(function: Callable[..., Awaitable[Result]], /, *args: Any, **kwargs: Any) -> Result:
    """Run user code that is to be awaited.

    Raises:
        Exception: What user code raised; a `UserCodeEscape` in place of what is no `Exception`.
        CancelledError: The task was cancelled from outside.
    """
    try:
        return await function(*args, **kwargs)
    except Exception:
        raise
    except BaseException as exc:
        if _is_cancellation(exc):
            raise
        raise UserCodeEscape(exc) from exc


def what_was_raised(error: BaseException) -> BaseException:
    """The exception as user code raised it."""
    return error.raised if isinstance(error, UserCodeEscape) else error


class UserThreads:
    """The threads on which the `def` code of a replica runs.

    Args:
        name: Prefix of the threads' names.
        count: How many there are. With one, user code needs no locks and may use things that stick to their thread.
    """

    def __init__(self, name: str, count: int) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=name)

    async def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run a function on a thread, in a copy of the caller's context; an awaitable that it returns is awaited."""
        return await self._run(copy_context(), function, args, kwargs)

    async def iterate(self, generator: Any) -> AsyncGenerator[Any, None]:
        """What a generator yields. A sync one advances on a thread, always in the same context; both are closed."""
        if isinstance(generator, AsyncGeneratorType):
            try:
                while (chunk := await enter(anext, generator, _EXHAUSTED)) is not _EXHAUSTED:
                    yield chunk
            finally:
                await enter(generator.aclose)
            return
        context = copy_context()
        try:
            while (chunk := await enter(self._run, context, next, (generator, _EXHAUSTED), {})) is not _EXHAUSTED:
                yield chunk
        finally:
            # In a task of its own: anyio cancels this one again and again, and a thread may not be free at once.
            await enter(asyncio.shield, spawn(self._run(context, generator.close, (), {})))

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
        """Take no more work; what runs goes on."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self, context: Context, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(self._executor, context.run, _run_sync, function, args, kwargs)
        return await result if inspect.isawaitable(result) else result


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


def _is_cancellation(exc: BaseException) -> bool:
    """Whether somebody ends the task, or the event loop has ended before it, and user code has no say in it."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return True
    return isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling() > 0
