"""Large values that other processes of this host have lent: found, checked, and copied out."""

import contextlib
import fcntl
import mmap
import os
import stat
import threading
import time
from collections.abc import Sequence

import msgspec

from qserve.errors import FrameRejected, QServeError
from qserve.this_machine import is_running, this_host
from qserve.values.segments import COPIED, HEADER, HELD, KEPT, SEALS, STATE_AT, MappedPages, place_of
from qserve.wire.messages import Lent
from qserve.wire.parts import Source, fresh

_KEPT_BYTES = 512 * 2**20
_KEPT_S = 3.0
_MOST_KEPT = 64


class ValueGone(QServeError):
    """A large value was lost with the process that had it, or has been taken back by it."""


class NotReachable(Exception):
    """This process cannot open what was lent: it has to be sent."""


class _Mapped:
    """A segment of another process, mapped here."""

    def __init__(self, pid: int, fd: int, size: int, mapped: mmap.mmap) -> None:
        self.pid = pid
        self.fd = fd
        self.size = size
        self.used_at = 0.0
        self.map = mapped
        self.pages = MappedPages(self.map, size, writes=False)

    def __del__(self) -> None:
        self.pages.give_up()
        os.close(self.fd)  # the map goes with the last view of it


class Borrowed:
    """What another process has lent, as the source of a value; see `qserve.wire.parts.Source`.

    Args:
        returns: Tell the lender when it has been copied out: nobody else reads it.
        views: Hand out read-only views of the lender's memory instead of copies.
    """

    __slots__ = ("__weakref__", "_holds", "_lent", "_mapped", "_passed", "_places", "_returns", "_size", "_views")

    def __init__(self, mapped: _Mapped, lent: Lent, *, returns: bool, views: bool) -> None:
        self._mapped = mapped
        self._lent = lent
        self._returns = returns
        self._views = views
        self._places, _ = place_of(lent.sizes)
        self._size = sum(lent.sizes)
        self._passed: Sequence[Source] = ()
        self._holds = False

    def __del__(self) -> None:
        if self._returns:
            self.drop()

    def __len__(self) -> int:
        return self._size

    @property
    def generation(self) -> int:
        """Which of the contents of its segment it is."""
        return self._lent.generation

    @property
    def head(self) -> bytes:
        return bytes(self._part(0))

    def take_bytes(self, number: int) -> bytes:
        self._check(number)
        return os.pread(self._mapped.fd, self._lent.sizes[number], self._places[number])

    def take(self, number: int, *, writable: bool = False) -> memoryview:
        self._check(number)
        if self._views and not writable:
            self._tell(KEPT)
            return self._part(number).toreadonly()
        made = fresh(self._lent.sizes[number])
        self._mapped.pages.copy(made, self._part(number), self._places[number])
        return made

    def size_of(self, number: int) -> int:
        return self._lent.sizes[number] if number < len(self._lent.sizes) else 0

    def view(self, number: int) -> memoryview:
        self._check(number)
        return self._part(number).toreadonly()

    def refer_to(self, passed: Sequence[Source]) -> None:
        """Note the values of other processes that it refers to."""
        self._passed = passed

    def passed_on(self, number: int) -> Source:
        return numbered(self._passed, number)

    def parts(self) -> list[memoryview]:
        """All of them, as they are in the lender's memory."""
        return [self._part(number) for number in range(len(self._places))]

    def is_there(self) -> bool:
        """Whether it is what was lent, still."""
        header: bytes = self._mapped.map[: HEADER.size]
        return header == HEADER.pack(self._lent.cookie, self._lent.generation)

    def lent_by(self, owner: str) -> Lent:
        """What another process needs to read this here, even after the first lender has gone."""
        return msgspec.structs.replace(self._lent, owner=owner, pid=os.getpid(), fd=self._mapped.fd)

    def hold(self) -> None:
        self._holds = True
        self._tell(HELD)

    def keep(self) -> None:
        self._tell(KEPT)

    def finish(self) -> None:
        """Nothing more will be taken.

        Raises:
            ValueGone: The lender has taken it back meanwhile, so that what was copied may be something else.
        """
        if not self.is_there():
            raise ValueGone("a large value was taken back by its sender while it was read")
        if self._returns and not self._holds:
            self._returns = False
            if self._mapped.map[STATE_AT] != KEPT:
                self._tell(COPIED)

    def drop(self) -> None:
        self._holds = False
        with contextlib.suppress(ValueGone):
            self.finish()

    def _part(self, number: int) -> memoryview:
        at = self._places[number]
        return memoryview(self._mapped.map)[at : at + self._lent.sizes[number]]

    def _check(self, number: int) -> None:
        if not 0 < number < len(self._lent.sizes):
            raise FrameRejected(f"a value that refers to buffer {number} of {len(self._lent.sizes) - 1}")

    def _tell(self, state: int) -> None:
        self._mapped.map[STATE_AT] = state


def numbered(passed: Sequence[Source], number: int) -> Source:
    """One of the values that a value refers to.

    Raises:
        FrameRejected: There is none of that number.
    """
    if not 0 < number <= len(passed):
        raise FrameRejected(f"a value that refers to value {number} of {len(passed)}")
    return passed[number - 1]


class Borrowing:
    """The segments of other processes that this one has mapped, a few of them kept for the next value. Thread-safe."""

    def __init__(self) -> None:
        self._mapped: dict[tuple[int, int, bytes], _Mapped] = {}
        self._lock = threading.Lock()

    def open(self, lent: Lent, *, returns: bool, views: bool = False) -> Borrowed:
        """Open what was lent.

        Raises:
            NotReachable: It cannot be opened from here.
            ValueGone: It is there no more.
            FrameRejected: It is not what it says.
        """
        _, end = place_of(lent.sizes)
        if views:  # a map of its own, which goes with the last view, and which user code may still read after a fork
            mapped = _open(lent, end, forks=True)
        else:
            key = (lent.pid, lent.inode, lent.cookie)
            with self._lock:
                found = self._mapped.get(key)
            mapped = found or _open(lent, end)
            mapped.used_at = time.monotonic()
            with self._lock:
                self._mapped[key] = mapped
            if found is None:
                self.trim()
        if mapped.size < end or mapped.map[: HEADER.size] != HEADER.pack(lent.cookie, lent.generation):
            raise ValueGone("a large value is there no more: its sender has taken it back")
        return Borrowed(mapped, lent, returns=returns, views=views)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is mapped."""
        return not self._mapped

    def trim(self) -> None:
        """Give up maps that were not used lately, those of dead processes, and what is more than enough."""
        if not self._mapped:
            return
        now, total, count = time.monotonic(), 0, 0
        with self._lock:
            for key, mapped in sorted(self._mapped.items(), key=lambda item: -item[1].used_at):
                total += mapped.size
                count += 1
                is_enough = total > _KEPT_BYTES or count > _MOST_KEPT
                if is_enough or now - mapped.used_at > _KEPT_S or not is_running(mapped.pid):
                    del self._mapped[key]  # closed when nobody reads it any more

    def close(self) -> None:
        """Give up all of them."""
        with self._lock:
            self._mapped.clear()


def _open(lent: Lent, end: int, *, forks: bool = False) -> _Mapped:
    if lent.fd < 0 or not lent.host or lent.host != this_host():
        raise NotReachable
    path = f"/proc/{lent.pid}/fd/{lent.fd}"
    try:
        # What this is, before it is opened: opening a pipe or a device would do something.
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
            raise ValueGone("a large value is there no more: its sender has closed it")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as exc:
        if not is_running(lent.pid):
            raise ValueGone("a large value was lost with the process that had it") from exc
        raise NotReachable from exc
    except OSError as exc:
        raise NotReachable from exc
    try:
        _check(fd, lent, end)
        size = os.fstat(fd).st_size
        mapped = mmap.mmap(fd, size)
        if not forks:
            mapped.madvise(mmap.MADV_DONTFORK)
        return _Mapped(lent.pid, fd, size, mapped)
    except BaseException as exc:
        os.close(fd)
        if isinstance(exc, OSError):  # no descriptors left, or no room for another map
            raise NotReachable from exc
        raise


def _check(fd: int, lent: Lent, end: int) -> None:
    found = os.fstat(fd)
    if found.st_ino != lent.inode or found.st_size < end:
        raise ValueGone("a large value is there no more: its sender has closed it")
    if found.st_uid != os.geteuid():
        raise NotReachable
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as exc:
        raise FrameRejected("a large value in a file that is no memory file") from exc
    if seals & SEALS != SEALS:
        raise FrameRejected("a large value in a memory file that may shrink")
    if os.pread(fd, 16, 0) != lent.cookie:
        raise FrameRejected("a large value in a memory file of another")
