"""A `concurrent.futures.Future` that costs little until somebody blocks on it."""

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import InvalidStateError
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, PENDING
from typing import TYPE_CHECKING, Any, Generic, TypeVar

T = TypeVar("T")

_lock = threading.RLock()
"""Guards every change of state and every condition's birth; held for a few instructions at a time.

Whoever holds it may be interrupted by the garbage collector or a signal, whose code may settle another future.
"""
# Another thread may hold it at that moment.
os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # type: ignore[attr-defined]


_ASYNCIO_WAIT = asyncio.wait.__module__
"""Of the callback with which `asyncio.wait` watches what it takes for futures of its own loop."""


class _OnLoop:
    """A callback that is to be called on an event loop; equal to the callback, so that it is found to be removed."""

    def __init__(self, fn: Callable[[Any], object], loop: asyncio.AbstractEventLoop) -> None:
        self._fn = fn
        self._loop = loop

    def __eq__(self, other: object) -> bool:
        return other is self._fn

    def __hash__(self) -> int:
        return hash(self._fn)

    def __call__(self, ref: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed
            self._loop.call_soon_threadsafe(self._fn, ref)


class _NotMade(Exception):
    """Stands where the exception would be: the result is there, but nobody has asked for it yet."""

    def __init__(self, raw: object, make: Callable[[Any], object]) -> None:
        super().__init__()
        self.raw = raw
        self.make = make
        self.lock = threading.Lock()


class LightFuture(concurrent.futures.Future[T], Generic[T]):
    """A future whose condition variable is made for the first thread that waits on it.

    The standard one makes it at once: a dozen objects, a seventh of what a call costs its caller, and all of them for
    the garbage collector to look at, although most futures are awaited and never waited on.
    `concurrent.futures.wait` and `as_completed`, which reach for `_condition` and `_waiters`, work as ever. A cancelled
    one is done at once: no executor has to take notice of it.
    """

    def __init__(self) -> None:
        # Not Future's own, which would make the condition.
        self._state = PENDING
        self._result: Any = None
        self._exception: BaseException | None = None
        self._waiters: list[Any] = []
        self._done_callbacks: list[Callable[[Any], object]] = []
        self._made_condition: threading.Condition | None = None

    if not TYPE_CHECKING:  # to the standard library it is an attribute

        @property
        def _condition(self) -> threading.Condition:
            if (condition := self._made_condition) is not None:
                return condition
            made = threading.Condition()  # before the lock is taken, since making it may start the collector
            with _lock:
                if self._made_condition is None:
                    self._made_condition = made
                return self._made_condition

    def done(self) -> bool:
        """Whether it has a result or an exception, or was cancelled."""
        return self._state is not PENDING

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._state is CANCELLED_AND_NOTIFIED

    def result(self, timeout: float | None = None) -> T:
        """The result, or the exception raised; waits for it up to `timeout` seconds.

        Raises:
            TimeoutError: It is not there in time.
            CancelledError: It was cancelled.
        """
        if self._state is not FINISHED:
            super().exception(timeout)
        if self._exception is None:
            result: T = self._result
            return result
        try:
            if type(self._exception) is _NotMade:
                return self._made(self._exception)
            raise self._exception
        finally:
            del self  # else the traceback would hold the future that holds the exception

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The exception or None; waits and raises like `result`."""
        found = self._exception if self._state is FINISHED else super().exception(timeout)
        return None if type(found) is _NotMade else found

    def cancel(self) -> bool:
        """Cancel it; False if it is done already."""
        return self._end(CANCELLED_AND_NOTIFIED, None, None)

    def set_result(self, result: T) -> None:
        """Settle it with a result.

        Raises:
            InvalidStateError: It is done already.
        """
        if not self._end(FINISHED, result, None):
            raise InvalidStateError(f"{self!r} is done already")

    def set_raw_result(self, raw: object, make: Callable[[Any], T]) -> None:
        """Settle it with a result that `make` makes from `raw` once somebody asks for it; raises like `set_result`."""
        self.set_exception(_NotMade(raw, make))

    @property
    def raw_result(self) -> object:
        """What the result will be made from; None if it is made already, or there is none."""
        found = self._exception
        return found.raw if type(found) is _NotMade else None

    def _made(self, not_made: _NotMade) -> T:
        with not_made.lock:
            if self._exception is not_made:
                try:
                    self._result, self._exception = not_made.make(not_made.raw), None
                except Exception as exc:
                    self._exception = exc
        return self.result(0)

    def set_exception(self, exception: BaseException | None) -> None:
        """Settle it with an exception; raises like `set_result`."""
        if not self._end(FINISHED, None, exception):
            raise InvalidStateError(f"{self!r} is done already")

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Call `fn` with this future once it is done: in the thread that settles it, or here and now."""
        if getattr(fn, "__module__", None) == _ASYNCIO_WAIT:
            fn = _OnLoop(fn, asyncio.get_running_loop())
        self.tell_when_done(fn)

    def tell_when_done(self, fn: Callable[[Any], object]) -> None:
        """What `add_done_callback` does, for callbacks that any thread may call."""
        with _lock:
            if self._state is PENDING:
                self._done_callbacks.append(fn)
                return
        fn(self)

    def remove_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Do not call `fn` once it is done; without effect where that has begun."""
        with _lock:
            if self._state is PENDING and fn in self._done_callbacks:
                self._done_callbacks.remove(fn)

    def _end(self, state: str, result: Any, exception: BaseException | None) -> bool:
        with _lock:
            if self._state is not PENDING:
                return False
            condition = self._made_condition
            if condition is None:
                self._result, self._exception = result, exception
                self._state = state
        if condition is not None:
            # Who holds it counts those that are done, and waits for the others: the state may not change meanwhile.
            with condition:
                with _lock:
                    if self._state is not PENDING:
                        return False
                    self._result, self._exception = result, exception
                    self._state = state
                for waiter in self._waiters:
                    if state is CANCELLED_AND_NOTIFIED:
                        waiter.add_cancelled(self)
                    elif exception is not None:
                        waiter.add_exception(self)
                    else:
                        waiter.add_result(self)
                condition.notify_all()
        if self._done_callbacks:
            self._invoke_callbacks()  # type: ignore[attr-defined]
        return True
