"""Processes that a node starts, or takes over from its template, and is the parent of."""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Process(Protocol):
    """A running process, as `asyncio.subprocess` has it."""

    @property
    def pid(self) -> int:
        """Its pid."""

    @property
    def returncode(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""

    async def wait(self) -> int:
        """Wait until it has ended; returns its exit code."""

    def send_signal(self, signum: int) -> None:
        """Send it a signal."""


class _Listed(NamedTuple):
    """A process as /proc lists it."""

    pid: int
    state: str
    parent: int
    session: int


Start = Callable[[], Awaitable[Process]]
"""Starts a process."""


def program(
    command: Callable[[], Sequence[str]],
    environment: Mapping[str, str],
    *,
    death_signal: signal.Signals = signal.SIGTERM,
    stdin: int = subprocess.DEVNULL,
    descriptors: tuple[int, ...] = (),
) -> Start:
    """A process that runs a program, in a session of its own.

    Args:
        command: Asked before each start.
        environment: Its environment.
        death_signal: What it gets when this process dies.
        stdin: Descriptor of what it reads from.
        descriptors: Which of ours it has besides.
    """

    async def start() -> Process:
        return await asyncio.create_subprocess_exec(
            *command(),
            env=environment,
            stdin=stdin,
            pass_fds=descriptors,
            start_new_session=True,
            preexec_fn=_dies_with_parent(death_signal),
        )

    return start


def _dies_with_parent(signum: signal.Signals) -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork: nothing may take a lock after it
    parent = os.getpid()

    def ask_for_signal() -> None:  # pragma: no cover (between fork and exec)
        prctl(_PR_SET_PDEATHSIG, int(signum))
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask_for_signal


def set_death_signal(signum: int) -> None:
    """Get a signal when the parent of this process dies, on Linux."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signum))


def die_with_parent(parent: int, signum: int) -> None:
    """Get a signal when the parent of this process dies, and end now if it has died already."""
    set_death_signal(signum)
    if os.getppid() != parent:
        os._exit(1)


def start_program(command: Sequence[str], *, death_signal: signal.Signals) -> int:
    """Start a program without an event loop, in a session of its own; returns its pid, for `os.waitpid`.

    No signal is blocked there, whatever this process blocks to wait for it. Only its user may read what it writes.

    Args:
        death_signal: What it gets when this process dies.
    """
    ask_for_signal = _dies_with_parent(death_signal)

    def begin() -> None:  # pragma: no cover (between fork and exec)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if ask_for_signal is not None:
            ask_for_signal()

    started = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        umask=0o077,
        preexec_fn=begin,  # noqa: PLW1509 whoever calls this has no threads
    )
    started.returncode = 0  # somebody else waits for it
    return started.pid


def children_of(pid: int) -> list[int]:
    """The running children of a process; none where the system has no /proc."""
    return [each.pid for each in _processes() if each.parent == pid and each.state != "Z"]


def processes_of_session(session: int) -> list[int]:
    """The processes of a session; none where the system has no /proc."""
    return [each.pid for each in _processes() if each.session == session]


def _processes() -> Iterator[_Listed]:
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            # The command's name comes before, in parentheses, and may hold anything.
            state, parent, _, session = entry.read_text().rpartition(")")[2].split()[:4]
            yield _Listed(int(entry.parent.name), state, int(parent), int(session))


def can_adopt() -> bool:
    """Whether this system lets a process be the parent of what its children have forked."""
    return sys.platform.startswith("linux") and hasattr(os, "pidfd_open")


def adopt_orphans() -> None:
    """From now on processes below this one whose parent ends become its children."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class AdoptedProcess:
    """A child of this process that another process has forked."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = asyncio.Event()
        self._descriptor = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._descriptor, self._reap)

    async def wait(self) -> int:
        """Wait until it has ended; returns its exit code."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Send it a signal."""
        if self.returncode is None:
            os.kill(self.pid, signum)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._ended.set()


class Orphans:
    """Reaps adopted processes that nobody waits for: what user code has left running, and what ended with it."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def reap(self) -> None:
        """To be called now and then. What has ended and is still there at the next call has nobody who waits for it."""
        ended = self._ended()
        for pid in ended & self._seen:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        self._seen = ended

    def _ended(self) -> set[int]:
        try:
            if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return set()
        except ChildProcessError:
            return set()
        return {each.pid for each in _processes() if each.state == "Z" and each.parent == os.getpid()}
