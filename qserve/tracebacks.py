"""Tracebacks as users want to read them: from their own code on."""

import re
from pathlib import Path
from typing import Final

_TRACEBACK = "Traceback (most recent call last):"
_USERS, _PYTHON, _OURS, _FRAMEWORK = "users", "python", "ours", "framework"
_KINDS: Final = (
    (
        _OURS,
        re.compile(rf'  File "([^"]*/qserve_workers/|[^"]*-packages/qserve/|{re.escape(str(Path(__file__).parent))}/)'),
    ),
    (_PYTHON, re.compile(r'  File "[^"]*/(concurrent/futures|asyncio)/')),
    (_FRAMEWORK, re.compile(r'  File "[^"]*(-packages/(fastapi|starlette|anyio)/|/python3\.\d+/contextlib\.py")')),
)


class UsersLines:
    """Takes lines one by one, and leaves out the frames of tracebacks that only lead to user code."""

    def __init__(self) -> None:
        self._inside = False
        self._head = ""
        self._kind = _USERS
        self._waiting: list[tuple[str, str]] = []
        """Lines of frames that are left out if a frame of the user's follows, each with its kind."""

    def feed(self, line: str) -> list[str]:
        """The lines to show now that this one has come."""
        if line == _TRACEBACK:
            before = self._end()
            self._inside, self._head, self._kind = True, line, _USERS
            return before
        if not self._inside:
            return [line]
        if line.startswith('  File "'):
            self._kind = next((kind for kind, pattern in _KINDS if pattern.match(line)), _USERS)
        elif not line.startswith(("    ", "  [Previous line repeated ")):
            return [*self._end(), line]
        if self._kind != _USERS:
            self._waiting.append((self._kind, line))
            return []
        is_first, kinds = bool(self._head), {kind for kind, _ in self._waiting}
        if is_first or kinds & {_OURS, _FRAMEWORK}:
            self._waiting = []
        return [*self._shown(self._waiting), line]

    def _end(self) -> list[str]:
        """What is left of a traceback: an error inside a framework shows where, and one inside ours what it says."""
        no_user = bool(self._head)
        left = [(kind, line) for kind, line in self._waiting if kind == _FRAMEWORK or not no_user]
        shown = self._shown(left) if left else []
        self._inside, self._head, self._waiting = False, "", []
        return shown

    def _shown(self, lines: list[tuple[str, str]]) -> list[str]:
        head, self._head, self._waiting = self._head, "", []
        return [*([head] if head else []), *(line for _, line in lines)]


def users_part(text: str) -> str:
    """Return a text without the frames of its tracebacks that only lead from a replica to the user's code."""
    lines = UsersLines()
    return "\n".join(shown for line in text.strip().splitlines() for shown in lines.feed(line))


def gist(text: str) -> str:
    """The line of an error that says what it is: the first, or that after the frames of its last traceback."""
    said = text.rpartition(_TRACEBACK)[2].strip("\n")
    return next((line for line in said.splitlines() if line.strip() and not line.startswith("  ")), "").strip()
