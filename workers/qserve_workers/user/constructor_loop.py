"""The event loop for modules and for a `def __init__`: they run on a thread, so that they may block, and may use the
loop all the same.

Programs for Ray Serve start background tasks and open client sessions in their constructors, and uvicorn imports
modules while its loop runs. Meanwhile `asyncio.get_running_loop()`, `create_task()` and so on find the loop of the
replica on that thread. What is begun there starts afterwards: it finds instance and module complete, and no loop is
touched by a thread that is not its own.
"""

import asyncio
import asyncio.events
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextvars import Context
from typing import Any


async def lend_loop(run: Callable[..., Awaitable[Any]], function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run a function on a thread that finds the event loop there; returns what it returns, and raises what it raises.

    Args:
        run: Runs a function on a thread.
    """
    loop = asyncio.get_running_loop()
    if _is_lent(loop):  # to the constructor of another deployment, in a unit test
        return await run(function, *args, **kwargs)
    constructor = _Constructor(loop)
    with constructor.lending():
        return await run(constructor.call, function, args, kwargs)


class _Constructor:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = 0
        self._begun: list[Callable[[], None]] = []
        self._running_loop = asyncio.get_running_loop

    def call(self, init: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the constructor on this thread."""
        self._thread = threading.get_ident()
        asyncio.set_event_loop(self._loop)
        try:
            return init(*args, **kwargs)
        finally:
            with contextlib.suppress(RuntimeError):  # there is none any more
                if asyncio.get_event_loop() is self._loop:  # the constructor may have set one of its own
                    asyncio.set_event_loop(None)
            self._thread = 0

    @contextlib.contextmanager
    def lending(self) -> Iterator[None]:
        """A block in which the constructor may run; at its end, what it has begun starts."""
        loop: Any = self._loop
        own: dict[str, Callable[..., Any]] = {
            "call_soon": self._call_soon,
            "call_later": self._call_later,
            "call_at": self._call_at,
        }
        before = {name: getattr(loop, name) for name in own}
        for name, held in own.items():
            setattr(loop, name, _unless_on(self._is_here, held, before[name]))
        for module in (asyncio, asyncio.events):
            module.get_running_loop = self._get_running_loop  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for module in (asyncio, asyncio.events):
                module.get_running_loop = self._running_loop  # type: ignore[attr-defined]
            for name in own:
                delattr(loop, name)
            for start in self._begun:
                start()

    def _is_here(self) -> bool:
        return threading.get_ident() == self._thread

    def _get_running_loop(self) -> asyncio.AbstractEventLoop:
        try:
            return self._running_loop()
        except RuntimeError:
            if self._is_here():
                return self._loop
            raise

    def _call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self._loop, context)
        self._begun.append(lambda: self._start(handle, 0))
        return handle

    def _call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self._call_at(self._loop.time() + delay, callback, *args, context=context)

    def _call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = _HeldTimer(when, callback, args, self._loop, context)
        self._begun.append(lambda: self._start(handle, when))
        return handle

    def _start(self, handle: asyncio.Handle, when: float) -> None:
        def run() -> None:
            if not handle.cancelled():
                handle._run()

        if when:
            self._loop.call_at(when, run)
        else:
            self._loop.call_soon(run)


class _HeldTimer(asyncio.TimerHandle):
    def cancel(self) -> None:
        asyncio.Handle.cancel(self)  # the loop, which TimerHandle tells of it, does not know this one


def _is_lent(loop: asyncio.AbstractEventLoop) -> bool:
    return "call_soon" in vars(loop)


def _unless_on(is_here: Callable[[], bool], held: Callable[..., Any], original: Callable[..., Any]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        return held(*args, **kwargs) if is_here() else original(*args, **kwargs)

    return call
