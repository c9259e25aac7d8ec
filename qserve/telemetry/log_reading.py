"""Reading a log: its records, the last ones first where only they are wanted, and those that are still to come."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

_BEGINS: Final = re.compile(r"\{|\[?\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d|\[")
"""How the first line of a record begins: the others are tracebacks and the like."""
_MOST_LINES: Final = 10_000
"""A record has no more: what is printed is no record, and would be kept in memory until one comes."""
_LONGEST_LINE: Final = 1 << 24
_BLOCK: Final = 1 << 16
_WHOLE_LINES: Final = re.compile(rb"[^\n]*\n|[^\n]+").findall
"""Unlike `splitlines`, it leaves a progress bar in one piece."""


class RecordReader:
    """Puts lines together to records, and finds those that name all of some words.

    Args:
        words: Names and ids.
    """

    def __init__(self, words: Iterable[str] = ()) -> None:
        self._words = [(word, re.compile(rf"(?<![\w.-]){re.escape(word)}(?![\w-])")) for word in words]
        self._lines: list[str] = []
        self._belongs = not self._words

    def feed(self, lines: Iterable[str]) -> Iterator[str]:
        """The records that end before the last of these lines."""
        for line in filter(None, lines):
            if self._lines and (_BEGINS.match(line) or len(self._lines) == _MOST_LINES):
                yield from self.flush()
            self._lines.append(line)

    def flush(self) -> Iterator[str]:
        """The last record, as far as it is there. What comes of it later belongs to it, whatever it names."""
        if self._lines:
            text, is_first = "".join(self._lines), _BEGINS.match(self._lines[0])
            self._lines = []
            self._belongs = self.is_wanted(text) or (self._belongs and not is_first)
            if self._belongs:
                yield text

    def is_wanted(self, record: str) -> bool:
        """Whether a record names all of the words."""
        return all(word in record and found.search(record) for word, found in self._words)


class GrowingFile:
    """A file to which others append, and which may be rotated meanwhile: cut short, or replaced by a new one.

    Args:
        start: Where to begin.

    Raises:
        OSError: It cannot be read.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        self._path = path
        self._file = path.open("rb")
        self._file.seek(start)
        self._rest = b""

    def __enter__(self) -> "GrowingFile":
        return self

    def __exit__(self, *_exc: object) -> None:
        self._file.close()

    def lines(self) -> Iterator[str]:
        """The whole lines that were not given yet."""
        while True:
            while block := self._file.read(_BLOCK):
                *lines, self._rest = (self._rest + block).split(b"\n") if b"\n" in block else [self._rest + block]
                yield from (line.decode(errors="replace") + "\n" for line in lines)
                if len(self._rest) > _LONGEST_LINE:
                    yield self.rest()
            if not self._was_rotated():
                return
            if self._rest:  # of the old file, which nobody will complete
                yield self.rest() + "\n"

    def rest(self) -> str:
        """The beginning of a line that is not whole."""
        rest, self._rest = self._rest, b""
        return rest.decode(errors="replace")

    def _was_rotated(self) -> bool:
        here = os.fstat(self._file.fileno())
        if here.st_size < self._file.tell():
            self._file.seek(0)
            self._rest = b""
            return True
        try:
            there = self._path.stat()
            # Who writes may do so to the old one until it is told.
            if there.st_ino == here.st_ino or there.st_size == 0:
                return False
            newer = self._path.open("rb")
        except FileNotFoundError:  # between two files
            return False
        self._file.close()
        self._file = newer
        return True


def last_records(paths: Iterable[Path], words: Iterable[str], most: int, end: int) -> list[str]:
    """The last records of a log that name some words, without reading what is before them.

    Args:
        paths: The files of the log, the newest first.
        end: Where to begin in the newest one.
    """
    wanted, backwards = RecordReader(words), _lines_backwards(paths, end)
    found = (record for record in _records_backwards(backwards) if wanted.is_wanted(record))
    return list(itertools.islice(found, most))[::-1]


def end_of_lines(path: Path) -> int:
    """Where the last whole line of a file ends."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        last = next(_lines_of(file, end), b"\n")
        return end if last.endswith(b"\n") else end - len(last)


def _records_backwards(backwards: Iterable[bytes]) -> Iterator[str]:
    lines: list[str] = []
    for each in backwards:
        line = each.decode(errors="replace")
        lines.append(line)
        if _BEGINS.match(line) or len(lines) == _MOST_LINES:
            yield "".join(reversed(lines))
            lines = []
    if lines:
        yield "".join(reversed(lines))


def _lines_backwards(paths: Iterable[Path], end: int) -> Iterator[bytes]:
    for number, path in enumerate(paths):
        with path.open("rb") as file:
            yield from _lines_of(file, file.seek(0, os.SEEK_END) if number else end)


def _lines_of(file: BinaryIO, end: int) -> Iterator[bytes]:
    """The lines before a place, the last one first."""
    place, rest, size = end, b"", _BLOCK
    while place:
        start = max(0, place - size)
        file.seek(start)
        first, *lines = _WHOLE_LINES(file.read(place - start) + rest)
        yield from reversed(lines)
        # A long line is put together in few steps.
        place, rest, size = start, first, _BLOCK if lines else 2 * size
    if rest:
        yield rest
