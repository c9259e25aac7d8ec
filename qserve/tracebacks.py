"""Tracebacks as users want to read them: from their own code on."""

import re

_TRACEBACK = "Traceback (most recent call last):"
_OWN_FRAME = re.compile(r'  File "[^"]*/(qserve_workers|concurrent/futures|asyncio)/[^"]+", line')


class UsersLines:
    """Takes lines one by one, and leaves out the frames that only lead from a replica to the user's code."""

    def __init__(self) -> None:
        self._head = ""
        self._leading = False
        self._skipping = False

    def feed(self, line: str) -> list[str]:
        """The lines to show now that this one has come."""
        if line == _TRACEBACK:
            self._head, self._leading, self._skipping = line, True, False
            return []
        if self._leading and line.startswith('  File "'):
            self._leading = self._skipping = _OWN_FRAME.match(line) is not None
        elif not line.startswith("    "):
            if self._leading:  # nothing of the user's was on the way
                self._head = ""
            self._leading = self._skipping = False
        if self._skipping:
            return []
        head, self._head = self._head, ""
        return [head, line] if head else [line]


def users_part(text: str) -> str:
    """Return a text without the frames of its tracebacks that only lead from a replica to the user's code."""
    lines = UsersLines()
    return "\n".join(shown for line in text.strip().splitlines() for shown in lines.feed(line))


def gist(text: str) -> str:
    """The line of an error that says what it is: the first, or that after the frames of its last traceback."""
    said = text.rpartition(_TRACEBACK)[2].strip("\n")
    return next((line for line in said.splitlines() if line.strip() and not line.startswith("  ")), "").strip()
