"""Payloads in parts: what was packed, and the large buffers that it refers to, which nothing copies into it.

The packed value is part 0. It refers to the others by their numbers.
"""

import contextlib
import sys
from collections.abc import Sequence
from typing import Any, Protocol

Buffer = bytes | bytearray | memoryview
"""C-contiguous bytes."""

LARGE = 256 * 1024
"""Bytes from which on a buffer stands beside the packed value, unless a limit says otherwise."""

_STEP = 1024 * 1024


class Strided:
    """A numpy array whose bytes do not stand one after the other, as a part. It is laid out where it is written."""

    __slots__ = ("array", "nbytes", "order")

    def __init__(self, array: Any) -> None:
        self.array = array
        self.nbytes: int = array.nbytes
        self.order = "F" if array.flags.fnc else "C"

    def write_into(self, place: memoryview) -> None:
        """Lay the array out, in C order."""
        numpy = sys.modules["numpy"]
        numpy.copyto(numpy.ndarray(self.array.shape, self.array.dtype, place), self.array)


Part = Buffer | Strided


class Passed:
    """A large value of another process as an argument of a call: handed on as it is, and never looked at here."""

    __slots__ = ("source",)

    def __init__(self, source: "Source") -> None:
        self.source = source


class Parts:
    """A large payload on its way out. Its parts are the caller's memory until somebody copies them.

    Attributes:
        parts: The packed value, and the buffers it refers to.
        passed: The values of other processes it refers to.
    """

    __slots__ = ("_size", "parts", "passed")

    def __init__(self, *parts: Part, passed: Sequence["Source"] = ()) -> None:
        self.parts = parts
        self.passed = passed
        self._size = sum(map(size_of, parts)) + sum(map(len, passed))

    def __len__(self) -> int:
        return self._size


class Source(Protocol):
    """A large payload that has arrived, whose parts can be taken out."""

    def __len__(self) -> int:
        """All bytes."""
        ...

    @property
    def head(self) -> bytes:
        """The packed value."""
        ...

    def take_bytes(self, number: int) -> bytes:
        """A part as bytes."""
        ...

    def take(self, number: int, *, writable: bool = False) -> memoryview:
        """A part in memory of its own, or where the receiver wants views and it need not be writable, a view."""
        ...

    def view(self, number: int) -> memoryview:
        """A part where it is. It stays the same until this is dropped, or for good where it is kept."""
        ...

    def size_of(self, number: int) -> int:
        """Bytes of a part; 0 where there is none of that number."""
        ...

    def hold(self) -> None:
        """It is read more than once, or slowly: it is returned when it is dropped."""
        ...

    def keep(self) -> None:
        """Somebody may go on to read it: its memory is not to be used for another value."""
        ...

    def drop(self) -> None:
        """Tell the lender that nobody wants it any more, as happens when nobody refers to it."""
        ...

    def passed_on(self, number: int) -> "Source":
        """A value of another process that this one refers to."""
        ...

    def finish(self) -> None:
        """Nothing more will be taken. Raises QServeError if what was taken may not be what was sent."""
        ...


Payload = bytes | Parts
"""What was packed, large or small."""


def size_of(part: Part) -> int:
    """How many bytes a part has."""
    return len(part) if isinstance(part, bytes | bytearray) else part.nbytes


def flat(payload: "Payload | Source") -> bytes:
    """The bytes of a payload that refers to no other parts.

    Raises:
        TypeError: It does.
    """
    if isinstance(payload, bytes):
        return payload
    if isinstance(payload, Parts):
        only = payload.parts[0]
        if len(payload.parts) > 1 or payload.passed or not isinstance(only, bytes):
            raise TypeError("a payload of several parts where only a small one can be")
        return only
    data = payload.head
    payload.finish()
    return data


def fresh(size: int) -> memoryview:
    """Memory that nobody else uses, whose content is arbitrary."""
    # numpy asks for huge pages, and leaves the memory as it is: six times as fast for 64 MiB.
    numpy = sys.modules.get("numpy")
    return memoryview(bytearray(size) if numpy is None else numpy.empty(size, numpy.uint8))


def copy(place: memoryview, data: Buffer) -> None:
    """Copy bytes, without keeping other threads from running for more than a moment."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and len(data) >= _STEP:
        numpy.copyto(numpy.frombuffer(place, numpy.uint8), numpy.frombuffer(data, numpy.uint8))
        return
    view = memoryview(data)
    for start in range(0, len(view), _STEP):
        place[start : start + _STEP] = view[start : start + _STEP]


def byte_view(data: Any) -> memoryview | None:
    """The bytes of an object that has a contiguous buffer; None if it has none."""
    with contextlib.suppress(TypeError, ValueError, BufferError):
        view = memoryview(data)
        return view.cast("B") if view.c_contiguous else None
    return None
