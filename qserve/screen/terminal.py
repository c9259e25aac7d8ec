"""One terminal for the moving display and for what the processes of an instance write."""

import atexit
import contextlib
import functools
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from qserve.tracebacks import UsersLines

if TYPE_CHECKING:
    from rich.console import Console

_LAST_LINES_S = 2.0
_HIDDEN: Final = frozenset({"DEBUG", "INFO"})
_RECORD: Final = re.compile(
    r"(?:[\d-]{10} )?(?P<time>\d\d:\d\d:\d\d)(?:,\d+)? (?P<level>[A-Z]+) +"
    r"(?:\w+\[\d+\] )?(?P<about>\[[^\]]*\] )?(?:[\w.]+: )?(?P<message>.*)"
)
"""A record of the log: when, how bad, from which process and about which call, from which module, and what."""
_NOT_CONSTRUCTED: Final = " could not be constructed"
_COLOURS: Final = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


@functools.cache
def terminal() -> "Console":
    """The console on stderr; whoever writes through it stays clear of the display."""
    from rich.console import Console  # noqa: PLC0415 (takes longer to import than all of qserve)

    return Console(stderr=True)


class Relay:
    """Shows what the processes of an instance write, line by line, above the display.

    Args:
        everything: Show records below WARNING, too, and all of each record.

    Attributes:
        deploying: Somebody waits for a deploy, and will be told why it failed: what each replica says of that is left
            out.
        environment: What these processes need to find in their environment.
    """

    def __init__(self, *, everything: bool) -> None:
        self.deploying = True
        self._everything = everything
        self._users = UsersLines()
        self._hiding = False
        # Asked now: in the block below, stderr is no terminal.
        self.environment = {"QSERVE_NAMES_OUTPUT": "1"}
        if sys.stderr.isatty() and "QSERVE_ACCESS_LOG" not in os.environ:
            self.environment["QSERVE_ACCESS_LOG"] = "short"

    @contextlib.contextmanager
    def output_of_new_processes(self) -> Iterator[None]:
        """What processes that are started in this block write to stderr is shown."""
        read, write = os.pipe()
        thread = threading.Thread(target=self._run, args=(read,), name="qserve-output", daemon=True)
        thread.start()
        atexit.register(thread.join, _LAST_LINES_S)  # it ends with the last process that writes
        stderr = os.dup(2)
        os.dup2(write, 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            os.close(write)

    def _run(self, read: int) -> None:
        with os.fdopen(read, errors="replace") as lines:
            for line in lines:
                for shown in self.feed(line.rstrip("\n")):
                    show_line(shown)

    def feed(self, line: str) -> list[str]:
        """The lines to show now that this one has come."""
        if self._everything:
            return [line]
        if not line:
            return []
        if _RECORD.fullmatch(line):
            self._hiding = self.deploying and _NOT_CONSTRUCTED in line
        elif self._hiding and " | " not in line:
            return []
        if self._hiding and _NOT_CONSTRUCTED in line:
            return []
        return [shown for each in self._users.feed(line) if (shown := as_shown(each)) is not None]


def show_line(text: str) -> None:
    """Print a line to stderr, clear of the display."""
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError, ValueError):  # nobody looks any more
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
        return
    words = text.split(maxsplit=2)
    style = _COLOURS.get(words[1]) if len(words) > 1 else None
    terminal().print(text, markup=False, highlight=False, soft_wrap=True, style=style)


def as_shown(line: str) -> str | None:
    """A line as somebody sees it who only wants to know what happens to the application; None if it is left out.

    Records below WARNING are, and the others lose their date and origin. What user code and the access log have
    written stays.
    """
    name, bar, rest = line.partition(" | ")
    by_user = bar and " " not in name
    record = _RECORD.fullmatch(rest if by_user else line)
    if record is None:
        return line
    if by_user:
        return f"{name} | {record['level']} {record['message']}"
    if record["level"] in _HIDDEN:
        return None
    about = f"[{record['about'].strip('[] ').split()[0]}] " if record["about"] else ""  # without the ids of the call
    return f"{record['time']} {record['level']} {about}{record['message']}"
