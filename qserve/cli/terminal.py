"""One terminal for the moving display and for what the started processes log."""

import atexit
import contextlib
import functools
import os
import sys
import threading
from collections.abc import Iterator

from rich.console import Console

_LAST_LINES_S = 2.0


@functools.cache
def terminal() -> Console:
    """The console on stderr; whoever writes through it stays clear of the display."""
    return Console(stderr=True)


@contextlib.contextmanager
def logs_above_display() -> Iterator[None]:
    """Processes started in this block log through `terminal()`, so that the display does not run into their lines.

    Where stderr is no terminal there is no display, and they write to it themselves.
    """
    if not sys.stderr.isatty():
        yield
        return
    read, write = os.pipe()
    relay = threading.Thread(target=_relay, args=(read,), name="qserve-logs", daemon=True)
    relay.start()
    atexit.register(relay.join, _LAST_LINES_S)  # it ends with the last process that writes
    stderr = os.dup(2)
    os.dup2(write, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(write)


def _relay(read: int) -> None:
    with os.fdopen(read, errors="replace") as lines:
        for line in lines:
            terminal().print(line.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)
