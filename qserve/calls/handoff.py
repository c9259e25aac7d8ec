"""Work handed from any thread to the thread of an event loop."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qserve.calls.client import Client


class Handoff:
    """Runs actions on one event loop, from any thread.

    Many actions cost one wake-up of the loop, which is a system call.

    Attributes:
        thread: The id of the loop's thread; 0 before `open`.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self.thread = 0
        self._actions: deque[Callable[[], None]] = deque()
        self._is_wake_scheduled = False
        self._waking = 0
        """The thread that is about to wake the loop: the handler of a signal that interrupts it there has to do so."""
        self._is_closed = False

    def open(self) -> asyncio.AbstractEventLoop:
        """Run actions on the running loop, and in this thread, from now on; returns the loop."""
        self._loop, self.thread = asyncio.get_running_loop(), threading.get_ident()
        return self._loop

    def close(self) -> None:
        """Run what is left; from now on actions run in the thread that hands them over."""
        self._is_closed = True
        self._run()

    def is_own_thread(self) -> bool:
        """Whether this is the thread of the loop, which must not block on it."""
        return threading.get_ident() == self.thread

    def run(self, action: Callable[[], None]) -> None:
        """Run an action on the loop: soon, or at once where this is its own thread."""
        if threading.get_ident() == self.thread:
            action()
        else:
            self.run_from_thread(action)

    def run_from_thread(self, action: Callable[[], None]) -> None:
        """Run an action on the loop soon, from another thread."""
        self._actions.append(action)
        is_coming = self._is_wake_scheduled and not (self._waking and self._waking == threading.get_ident())
        if not is_coming and self._loop is not None:
            self._waking = threading.get_ident()
            self._is_wake_scheduled = True
            with contextlib.suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(self._run)
            self._waking = 0
        if self._is_closed:  # nobody may come for it any more
            self._run()

    def _run(self) -> None:
        self._is_wake_scheduled = False
        actions = self._actions
        while actions:
            try:
                action = actions.popleft()
            except IndexError:  # a thread that finds it closed runs what there is as well
                return
            action()


def run_when_dropped(client: "Client", action: Callable[[], None]) -> None:
    """Run an action on the loop of a client later, because an object is gone: for finalizers.

    The collector calls those in any thread, the loop's too, in the middle of anything: so nothing is done at once.
    """
    with contextlib.suppress(RuntimeError):  # the loop has closed
        if client.is_own_thread():
            client.loop.call_soon(action)
        else:
            client.run_soon(action)
