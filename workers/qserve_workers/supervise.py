"""Processes that are kept running: started again with backoff when they end, stopped in order, never left behind."""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable

from qserve_workers.children import Process, Start, processes_of_session

logger = logging.getLogger("qserve.node")

BACKOFF_S = (0.1, 10.0)
_GOOD_RUN_S = 10.0
"""A process that ran this long starts again without delay."""


class KeptProcess:
    """One process, kept running from `start` to `stop`.

    Every process leads a session of its own, so that a terminal's Ctrl-C reaches the node alone; the kernel ends it
    when the node dies.

    Args:
        what: What the log calls it.
        start: Starts it, for the first time and again.
        on_crash: Called when it has ended and is about to be started again.
        once: Started only once; `ended` says when it is gone.
    """

    def __init__(
        self,
        what: str,
        start: Start,
        *,
        on_crash: Callable[[], None] = lambda: None,
        once: bool = False,
    ) -> None:
        self._what = what
        self._start = start
        self._on_crash = on_crash
        self._once = once
        self._process: Process | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._stopping = False
        self.ended = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Pid of the running process, None between two runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    @property
    def returncode(self) -> int | None:
        """Exit code of the last run."""
        return self._process.returncode if self._process is not None else None

    def start(self) -> None:
        """Start it and keep it running."""
        self._keeping = asyncio.create_task(self._keep_running())

    async def wait(self) -> None:
        """Wait until it is gone for good: stopped, or `once` and ended."""
        await self.ended.wait()

    async def stop(self, grace_s: float, force: asyncio.Event, *, last_word_s: float = 0.0) -> None:
        """SIGTERM, then SIGKILL to all of its session after `grace_s`, or as soon as `force` is set.

        Args:
            last_word_s: How long before the SIGKILL it gets a second SIGTERM, upon which it says what it must and ends.
        """
        self._stopping = True
        if self._keeping is None:
            return
        if self.pid is None:
            self._keeping.cancel()
        else:
            self._signal(signal.SIGTERM)
        forced = asyncio.create_task(force.wait())
        await asyncio.wait((self._keeping, forced), timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        forced.cancel()
        if last_word_s and not self._keeping.done():
            self._signal(signal.SIGTERM)
            await asyncio.wait((self._keeping,), timeout=last_word_s)
        if not self._keeping.done():
            logger.warning("%s (pid %s) has not ended by itself, killing it.", self._what, self.pid)
            self._signal(signal.SIGKILL)
        with contextlib.suppress(asyncio.CancelledError):
            await self._keeping
        self.ended.set()

    def kill(self) -> None:
        """End it now; it is started again."""
        self._signal(signal.SIGKILL)

    async def _keep_running(self) -> None:
        delay = BACKOFF_S[0]
        while True:
            started = time.monotonic()
            try:
                how = reason_of(await self._run_once())
            except OSError as exc:
                how = f"could not be started: {exc}"
            if self._stopping or self._once:
                self.ended.set()
                return
            self._on_crash()
            if time.monotonic() - started > _GOOD_RUN_S:
                delay = BACKOFF_S[0]
            logger.warning("%s ended (%s), starting it again in %.1f s.", self._what, how, delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, BACKOFF_S[1])

    async def _run_once(self) -> int:
        self._process = await self._start()
        logger.info("%s: pid %d.", self._what, self._process.pid)
        if self._stopping:  # asked to stop while it was being started
            self._signal(signal.SIGTERM)
        code = await self._process.wait()
        self._end_what_is_left(self._process.pid)
        return code

    def _end_what_is_left(self, pid: int) -> None:
        """What its process group left behind drains and leaves; what replicas of it have started has no owner now."""
        for other in processes_of_session(pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(other, signal.SIGTERM if os.getpgid(other) == pid else signal.SIGKILL)

    def _signal(self, signum: signal.Signals) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if signum == signal.SIGKILL:
                for pid in (self._process.pid, *processes_of_session(self._process.pid)):
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signum)
            else:
                self._process.send_signal(signum)


def reason_of(code: int) -> str:
    """How a process ended that has this exit code."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # most real-time signals have no name
        return f"killed by signal {-code}"
