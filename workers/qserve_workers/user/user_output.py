"""What user code prints: seen at once, and under the name of its deployment where several share a terminal."""

import contextlib
import io
import logging
import sys
import threading
from typing import Any, TextIO


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
    sys.stdout = NamedOutput(sys.stdout, name)
    sys.stderr = NamedOutput(sys.stderr, name)
    if names_records and type(logging.lastResort) is logging.StreamHandler:
        logging.lastResort.setStream(sys.stderr)


class NamedOutput(io.TextIOBase):
    """A stream that writes whole lines, each with a name before it. Thread-safe.

    A line that is written over (with a carriage return, as progress bars do) appears as it was at its end.

    Args:
        stream: Where to write; what goes around this object (`buffer`, `fileno()`) has no name.
        name: The name.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._begun = ""
        self._lock = threading.Lock()

    @property
    def buffer(self) -> Any:
        """The stream of bytes below."""
        return self._stream.buffer

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
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
            if lines:
                self._put(lines)
        return len(text)

    def flush(self) -> None:
        """Without effect: lines that are complete have been written."""

    def close(self) -> None:
        """Write what is left."""
        with self._lock:
            if self._begun:
                self._put([self._begun])
                self._begun = ""
        super().close()

    def _put(self, lines: list[str]) -> None:
        shown = (line.rstrip("\r").rpartition("\r")[2] for line in lines)
        # At once, so that lines of several processes do not mix. A terminal that is gone is not user code's concern.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write("".join(f"{self._name} | {line}\n" for line in shown))
            self._stream.flush()
