"""Memory files that a process lends: sealed, pooled and used again, because fresh memory costs ten times the copy.

A segment begins with a header: a cookie that nobody can guess, the number of its present content, and a byte that tells
what has become of it. Then come the parts of the content, each at a multiple of 64. Its size is sealed, so that nobody
who has it mapped can be hit by SIGBUS.
"""

import contextlib
import fcntl
import mmap
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qserve.errors import PayloadTooLarge
from qserve.wire.messages import Lent
from qserve.wire.parts import Buffer, Part, Strided, copy, size_of

HEADER = struct.Struct("<16sQ")
STATE_AT = 24
LENT, COPIED, KEPT, HELD = range(4)
"""What has become of a content: somebody may still read it; it was copied out; somebody keeps it mapped, for good or
until it says that it was copied out."""
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_AT, _ALIGN = 64, 64
_SMALLEST, _STEP = 1 << 20, 1 << 24
_IDLE_BYTES = 512 * 2**20
_IDLE_S = 10.0
_ROOMIER = 4
"""How many times as large a segment may be as it has to."""
_MOST_IDLE, _MOST_FILES = 64, 256
"""Each takes a descriptor, of which processes may often have 1,024 only. What is lent beyond that has to be sent."""
_CHECKED_FROM = 64 * 2**20
"""Bytes from which on it is worth asking how much memory is free."""
_MARGIN = 32 * 2**20
_SLICE = 2 * 2**20
"""Bytes whose pages are mapped or given up at a time: Python keeps all other threads waiting meanwhile."""
_POPULATE_READ, _POPULATE_WRITE = 22, 23
"""For madvise, from Linux 5.14 on; not named in Python yet."""


def place_of(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where parts of these sizes stand in a segment, and where the last one ends."""
    places, at = [], _AT
    for size in sizes:
        places.append(at)
        at += -(-size // _ALIGN) * _ALIGN
    return places, at


class MappedPages:
    """The pages of a map. Those that nobody has touched yet are mapped many at a time, and given up so.

    One by one, as they are touched, the pages of 64 MiB take 80 ms; together they take 9.
    """

    def __init__(self, mapped: mmap.mmap, size: int, *, writes: bool) -> None:
        self._map = mapped
        self._size = size
        self._advice = _POPULATE_WRITE if writes else _POPULATE_READ
        self._mapped_to = 0

    def copy(self, place: memoryview, data: Buffer, at: int) -> None:
        """Copy bytes; those in the map begin at `at`, and are in it as a file already."""
        size = len(place)
        if at + size <= self._mapped_to:
            copy(place, data)
            return
        view = memoryview(data)
        for start in range(0, size, _SLICE):
            first = (at + start) // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError):  # an older Linux: then one by one
                self._map.madvise(self._advice, first, min(at + start + _SLICE, at + size) - first)
            copy(place[start : start + _SLICE], view[start : start + _SLICE])
        self._mapped_to = max(self._mapped_to, at + size)

    def give_up(self) -> None:
        """Unmap them. They are still in the file, and come back for whoever reads them after all."""
        for start in range(0, self._size, _SLICE):
            self._map.madvise(mmap.MADV_DONTNEED, start, min(_SLICE, self._size - start))


class Segment:
    """One memory file. Whoever holds it may write to it; others map it and only tell what has become of its content.

    Args:
        room: Bytes it can hold, header included.
        is_file: Others can open it. Else it is memory of this process alone, which takes no descriptor.
    """

    def __init__(self, room: int, *, is_file: bool = True) -> None:
        self.is_file = is_file
        self.room = room
        self.generation = 0
        self.idle_since = 0.0
        self._cookie = secrets.token_bytes(16)
        self._written = 0
        self._fd, self._inode = -1, 0
        if is_file:
            self._open()
        self._map = mmap.mmap(self._fd, room)
        self._map.madvise(mmap.MADV_DONTFORK)
        self._view = memoryview(self._map)
        self._pages = MappedPages(self._map, room, writes=True)

    def _open(self) -> None:
        self._fd = os.memfd_create("qserve", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, self.room)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)
            self._inode = os.fstat(self._fd).st_ino
        except BaseException:
            os.close(self._fd)
            raise

    def begin(self) -> None:
        """Give the segment another content, of which nothing is there yet."""
        self.generation += 1
        self._map[:_AT] = HEADER.pack(self._cookie, self.generation).ljust(_AT, b"\0")

    def write(self, at: int, part: Part) -> None:
        """Write a part of the content."""
        end = at + size_of(part)
        if isinstance(part, Strided):
            part.write_into(self._view[at:end])
        elif end <= self._written or not self.is_file:
            self._pages.copy(self._view[at:end], part, at)
        else:
            self._write_fresh(at, part)
        self.note_written(end)

    def _write_fresh(self, at: int, part: Buffer) -> None:
        # A third cheaper than having the pages faulted in one by one.
        view, done = memoryview(part), 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], at + done)

    def note_written(self, end: int) -> None:
        """Note that somebody has written up to there, into what `read` gives."""
        self._written = max(self._written, end)

    def lent(self, owner: str, host: str, sizes: Sequence[int], passed: Sequence[Lent] = ()) -> Lent:
        """What another process needs to read the present content, and the values of others that it refers to."""
        place = (os.getpid(), self._fd, self._inode, self._cookie, self.generation)
        return Lent(owner, host, *place, tuple(sizes), tuple(passed))

    def read(self, at: int, size: int) -> memoryview:
        """A piece of the content."""
        return self._view[at : at + size]

    @property
    def cookie(self) -> bytes:
        """What tells this segment from all others."""
        return self._cookie

    @property
    def state(self) -> int:
        """LENT, COPIED, KEPT or HELD."""
        return self._map[STATE_AT]

    def note_copied(self) -> None:
        """Note that the content has been sent."""
        self._map[STATE_AT] = COPIED

    def close(self) -> None:
        """Give the memory back, as far as nobody else has it mapped; for 64 MiB that takes 10 to 20 ms."""
        self._pages.give_up()
        self._view.release()
        with contextlib.suppress(BufferError):  # it is being sent; the map goes with the last view of it
            self._map.close()
        if self.is_file:
            os.close(self._fd)


class SegmentPool:
    """The segments of a process that are not in use. Thread-safe.

    Args:
        aside: Does something that takes a while where it holds nobody up.
    """

    def __init__(self, aside: Callable[[Callable[[], None]], None]) -> None:
        self._aside = aside
        self._idle: dict[int, list[Segment]] = {}
        self._lock = threading.Lock()
        self._files = 0

    def take(self, size: int) -> Segment:
        """A segment with room for so many bytes, the header included, for a new content.

        Raises:
            PayloadTooLarge: There is not so much memory.
        """
        room = _room_for(size)
        with self._lock:
            # A larger one spares the time that fresh memory takes, several times that of the copy.
            enough = (each for each, idle in self._idle.items() if idle and room <= each <= room * _ROOMIER)
            found = min(enough, default=0)
            segment = self._idle[found].pop() if found else None
        if segment is None:
            if size > _CHECKED_FROM and (free := free_memory()) < size + _MARGIN:
                raise PayloadTooLarge(f"a value takes {size:,} bytes, and only {free:,} bytes of memory are free here")
            segment = self._make(room)
        segment.begin()
        return segment

    def _make(self, room: int) -> Segment:
        if self._files < _MOST_FILES:
            with contextlib.suppress(OSError):  # no descriptors left, or a system without memory files
                made = Segment(room)
                with self._lock:
                    self._files += 1
                return made
        try:
            return Segment(room, is_file=False)
        except OSError as exc:
            raise PayloadTooLarge(f"there is no memory for a value of {room:,} bytes: {exc}") from exc

    def discard(self, segment: Segment) -> None:
        """Give up a segment whose content somebody may still read."""
        self._aside(segment.close)
        with self._lock:
            self._files -= segment.is_file

    def give_back(self, segment: Segment) -> None:
        """Keep a segment whose content nobody needs for the next one."""
        if segment.state == KEPT or not segment.is_file:
            self.discard(segment)
            return
        segment.idle_since = time.monotonic()
        with self._lock:
            self._idle.setdefault(segment.room, []).append(segment)
        self.trim(0.0)

    def trim(self, idle_s: float = _IDLE_S) -> None:
        """Close segments that have not been used for `idle_s` seconds (0: however long), until few enough are left."""
        before = time.monotonic() - idle_s if idle_s else -1.0
        closed = []
        with self._lock:
            everything = sorted((s for idle in self._idle.values() for s in idle), key=lambda s: -s.idle_since)
            kept: list[Segment] = []
            total = 0
            for segment in everything:
                total += segment.room
                if total <= _IDLE_BYTES and segment.idle_since >= before and len(kept) < _MOST_IDLE:
                    kept.append(segment)
                else:
                    closed.append(segment)
            if len(kept) < len(everything):
                self._idle = {}
                for segment in reversed(kept):
                    self._idle.setdefault(segment.room, []).append(segment)
        for segment in closed:
            self.discard(segment)

    def close(self) -> None:
        """Close all of them."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for segments in idle.values():
            for segment in segments:
                self.discard(segment)


def _room_for(size: int) -> int:
    if size <= _STEP:
        return max(_SMALLEST, 1 << (size - 1).bit_length())
    return -(-size // _STEP) * _STEP


def free_memory() -> int:
    """How many bytes a process could still use on this host, or in its container."""
    free = 1 << 62
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)
