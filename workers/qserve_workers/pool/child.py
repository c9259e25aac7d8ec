"""The child's side of the pool: one process, one replica, and a main thread that does nothing but wait.

Billiard's own loop polls once a second, takes SIGTERM as an order to unwind at once and sleeps a second before it
exits. Here the main thread sleeps until a signal or a Celery task wakes it, and leaves when the replica has drained.
"""

import contextlib
import os
import select
import signal
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from celery.concurrency import asynpool

from qserve_workers.pool import child_signals
from qserve_workers.replica.replica_process import ReplicaProcess
from qserve_workers.user.ordinary_process import become_ordinary, run_exit_hooks

_LONGEST_HEARING_S = 1.0
"""A Celery task on the main thread may take longer than whoever waits for signals to be heard has time."""


class Child(asynpool.Worker):  # type: ignore[misc]
    """The body of a pool process. `make_replica` is set by the pool just before it forks."""

    make_replica: Callable[[], ReplicaProcess]

    def after_fork(self) -> None:
        """Become a replica: forget the parent, take over the signals, start, and return at once."""
        _forget_sockets()
        super().after_fork()
        become_ordinary(child_signals.ALL)
        self._replica = self.make_replica()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)
        self._poll = select.poll()
        for fd in (self._wake_reader, self.inq._reader.fileno()):
            self._poll.register(fd, select.POLLIN)
        self._leaving = False
        self._orders: list[Callable[[], None]] = []
        for signum in child_signals.ALL:
            signal.signal(signum, self._on_signal)
        # A signal that comes just before the poll, or on another thread, does not end it: Python runs `_on_signal` only
        # after it. This wakes it at once.
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, child_signals.ALL)
        self._replica.start(self._hear_signals)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        match signum:
            case child_signals.LEAVE:
                self._leaving = True
            case child_signals.RELEASE:
                self._orders.append(self._replica.release)
            case child_signals.SERVE:
                self._orders.append(self._replica.serve)
        with contextlib.suppress(BlockingIOError):  # woken often enough
            os.write(self._wake_writer, b"\0")

    def _hear_signals(self) -> None:
        """Return once the main thread has acted on the signals that came before, or is busy for too long."""
        heard = threading.Event()
        self._orders.append(heard.set)
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_writer, b"\0")
        heard.wait(_LONGEST_HEARING_S)

    def _make_child_methods(self, *_args: Any) -> None:
        self.wait_for_job = self._wait_for_job
        self.wait_for_syn = None

    def _wait_for_job(self) -> Any:
        """The next Celery task; acts on signals while there is none.

        Raises:
            SystemExit: This replica is to leave.
        """
        ready = {fd for fd, _ in self._poll.poll()}
        if self._wake_reader in ready:
            os.read(self._wake_reader, 4096)
        if self._leaving:
            self._replica.drain()  # before those who wait for this to be heard
        while self._orders:
            self._orders.pop(0)()
        if self._leaving:
            raise SystemExit(0)
        if self.inq._reader.fileno() not in ready:
            return None
        try:
            job = self.inq.get()
        except (EOFError, OSError):
            raise SystemExit(1) from None
        if job is None:  # the pool closes
            raise SystemExit(0)
        return job

    def _do_exit(self, pid: int, exitcode: int | None, exc: BaseException | None = None) -> NoReturn:
        """Drain and end. No word to the pool: it watches the process itself."""
        code = exitcode or (1 if exc else 0)
        try:
            self._replica.drain()
            self._replica.wait_drained(None)
            if self.on_exit is not None:
                self.on_exit(pid, code)
            run_exit_hooks(self._replica.grace_left_s(), code)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _forget_sockets() -> None:
    """Let go of the parent's connections, and of its poller, without touching the objects that hold them.

    A later replica is forked from a parent that is connected: a socket kept here would stay open after the parent
    closed it, and a shared epoll would go on watching it. The number stays taken, so no object closes another's file.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (int(entry.name) for entry in Path("/dev/fd").iterdir()):
        if fd > 2 and fd != null and _is_socket_or_poller(fd):
            os.dup2(null, fd, inheritable=False)
    os.close(null)


def _is_socket_or_poller(fd: int) -> bool:
    try:
        mode = os.fstat(fd).st_mode
        return stat.S_ISSOCK(mode) or "eventpoll" in str(Path(f"/dev/fd/{fd}").readlink())
    except OSError:  # closed meanwhile, as the listing's own
        return False
