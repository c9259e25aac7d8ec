"""What user code prints: seen at once, and under the name of its deployment where several share a terminal."""

import contextlib
import io
import logging
import os
import sys
import threading
from collections import deque
from typing import Any, TextIO

_PATIENCE_S = 1.0
"""How long a thread waits until another one has written. Where that one waits for it in turn, both go on."""


def show_output(name: str | None, *, names_records: bool = True) -> None:
    """Let what this process prints be seen line by line, with a name before each line unless that is None.

    What programs that it starts and extension modules write by themselves has no name.

    Args:
        names_records: Records of user code that has configured no logging get the name, too.
    """
    if name is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)
        return
    sys.stdout, sys.stderr = outputs = (NamedOutput(sys.stdout, name), NamedOutput(sys.stderr, name))
    for output in outputs:
        os.register_at_fork(after_in_child=output.start_afresh)
    if names_records and type(logging.lastResort) is logging.StreamHandler:
        logging.lastResort.setStream(sys.stderr)


class NamedOutput(io.TextIOBase):
    """A stream that writes whole lines, each with a name before it. Thread-safe.

    The collector or a signal may run user code that prints while this thread is in here: what it prints comes after
    what is being written, and never waits for it.

    A line that is written over (with a carriage return, as progress bars do) appears as it was at its end.

    Args:
        stream: Where to write; what goes around this object (`buffer`, `fileno()`) has no name. It also has what this
            object has not, such as `reconfigure`.
        name: The name.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._begun: list[str] = []
        """The parts of a line that is not complete."""
        self.start_afresh()

    def start_afresh(self) -> None:
        """Forget what threads are about here that a new process does not have, and the line that they have begun."""
        self._waiting: deque[str] = deque()
        self._begun.clear()
        self._lock = threading.RLock()
        self._is_writing = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._stream, name)

    @property
    def buffer(self) -> Any:
        """The stream of bytes below."""
        return self._stream.buffer

    def detach(self) -> Any:
        """Give out the stream of bytes below; nothing more can be written here."""
        return self._stream.detach()  # type: ignore[attr-defined]

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """How characters become bytes."""
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """What becomes of characters that the encoding does not have."""
        return self._stream.errors

    def fileno(self) -> int:
        """The file descriptor below."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """Whether it can be written to."""
        return True

    def write(self, text: str, /) -> int:
        """Keep the text until its line is complete."""
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self._waiting.append(text)
        self._write_what_waits()
        return len(text)

    def flush(self) -> None:
        """Without effect: lines that are complete have been written."""

    def close(self) -> None:
        """Write what is left."""
        if self._begun:
            self.write("\n")
        super().close()

    def _write_what_waits(self) -> None:
        while self._waiting and self._lock.acquire(timeout=_PATIENCE_S):
            try:
                if self._is_writing:
                    return  # this thread, further up; it goes on with what waits
                self._is_writing = True
                try:
                    while self._waiting:
                        self._take(self._waiting.popleft())
                finally:
                    self._is_writing = False
            finally:
                self._lock.release()

    def _take(self, text: str) -> None:
        first, *others = text.split("\n")
        if first:
            self._begin(first)
        if others:
            *lines, last = ["".join(self._begun), *others]
            self._begun.clear()
            if last:
                self._begin(last)
            self._put(lines)

    def _begin(self, text: str) -> None:
        """Add to the line that is not complete; what has been written over is not kept."""
        self._begun.append(text)
        if "\r" in text:
            line = "".join(self._begun)
            end = line.rstrip("\r")
            self._begun[:] = [end.rpartition("\r")[2] + line[len(end) :]]

    def _put(self, lines: list[str]) -> None:
        shown = (line.rstrip("\r").rpartition("\r")[2] for line in lines)
        # At once, so that lines of several processes do not mix. A terminal that is gone is not user code's concern.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write("".join(f"{self._name} | {line}\n" for line in shown))
            self._stream.flush()
