"""What is deployed under load; imported by replicas. Not decorated, because mypy does not follow class decorators."""

import asyncio
import hashlib
import os
import time
from pathlib import Path
from typing import Any

from starlette.requests import Request

from qserve import serve


def answer_to(call: str) -> str:
    """The one right answer to a call."""
    return hashlib.sha256(call.encode()).hexdigest()[:16]


def note(path: str, line: str) -> None:
    """Append a line that outlives this process, however it ends."""
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


class LoadedCode:
    """Notes every call that it runs, and answers it.

    Args:
        notes: File of the calls that ran.
        seconds: How long a call takes.
        start: "raise" or "hang" in the constructor, or how many seconds it takes.
    """

    def __init__(self, notes: str, seconds: float = 0.002, start: str = "0") -> None:
        self._notes = notes
        self._seconds = seconds
        self._config: object = None
        if start == "raise":
            raise RuntimeError("this version cannot start")
        time.sleep(3600 if start == "hang" else float(start))

    def reconfigure(self, config: object) -> None:
        if config == "bad":
            raise ValueError("bad user_config")
        self._config = config

    async def __call__(self, what: Any) -> dict[str, object]:
        call = what if isinstance(what, str) else await self._call_of(what)
        note(self._notes, call)
        await asyncio.sleep(self._seconds)
        return {"call": call, "answer": answer_to(call), "config": self._config, "pid": os.getpid()}

    async def _call_of(self, request: Request) -> str:
        return str(request.query_params["call"])


class BlockingCode(LoadedCode):
    """The same with `def`: one call at a time."""

    def __call__(self, what: Any) -> dict[str, object]:  # type: ignore[override]
        call = what if isinstance(what, str) else what.query_params["call"]
        note(self._notes, call)
        time.sleep(self._seconds)
        return {"call": call, "answer": answer_to(call), "config": self._config, "pid": os.getpid()}


Loaded = serve.deployment(name="Loaded", graceful_shutdown_timeout_s=10)(LoadedCode)
Blocking = serve.deployment(name="Blocking", graceful_shutdown_timeout_s=10)(BlockingCode)


def ran(notes: Path) -> list[str]:
    """The calls that ran, in order."""
    return notes.read_text().split() if notes.exists() else []
