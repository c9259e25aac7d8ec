"""What the failpoint tests deploy: writes down every run."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

from qserve.context import current_call

LARGE = 400_000
"""Bytes that travel out of line."""


class Work:
    """Notes `name attempt` for each run in a file; a write(2) that has returned survives the end of its process."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    async def __call__(self, request: object) -> str:
        self._note("http")
        return "http"

    async def work(self, name: str, _filler: bytes = b"") -> list[object]:
        """Say which attempt this is."""
        return [name, self._note(name)]

    async def large(self, name: str) -> bytes:
        """A result that travels out of line."""
        self._note(name)
        return bytes(LARGE)

    async def parts(self, name: str) -> AsyncIterator[int]:
        """A result in parts, each of which leaves by itself: those of one turn leave together with the answer."""
        self._note(name)
        for part in range(3):
            yield part
            await asyncio.sleep(0)

    async def fragile(self, name: str) -> list[object]:
        """Its first run ends the process."""
        attempt = self._note(name)
        if attempt == 1:
            os._exit(9)
        return [name, attempt]

    async def locked(self, name: str) -> list[object]:
        """Fails until somebody has opened the gate."""
        attempt = self._note(name)
        if not (self._folder / "gate").exists():
            raise ValueError("the gate is closed")
        return [name, attempt]

    def _note(self, name: str) -> int:
        info = current_call.get()
        attempt = 1 if info is None else info.attempt
        descriptor = os.open(self._folder / "runs", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(descriptor, f"{name} {attempt}\n".encode())
        os.close(descriptor)
        return attempt
