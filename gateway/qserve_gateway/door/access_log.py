"""The access log: one line for each response, written on a thread."""

import asyncio
import contextlib
import os
import select
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple

import msgspec

FLUSH_S = 0.25
MOST_HELD = 100_000
"""How many lines are held while nobody reads them; further ones are dropped and counted."""
_LAST_WORD_S = 1.0
"""How long a gateway that ends waits for somebody to read the last lines."""


class Line(NamedTuple):
    """The facts of a response; the thread that writes puts them into words."""

    at: float
    client: tuple[str, int] | None
    method: str
    path: bytes
    query: bytes
    version: str
    status: int
    size: int
    seconds: float
    deployment: str
    request_id: str


class AccessLog:
    """Collects lines and writes them four times a second, on a thread.

    Where nobody reads them the thread waits for ever, so it is one that a process does not wait for when it ends.

    Args:
        style: "short", "text" or "json".
        descriptor: The file descriptor to write to.
    """

    def __init__(self, style: str, descriptor: int = 1) -> None:
        self._put_into_words = _STYLES[style]
        self._descriptor = descriptor
        self._lines: list[Line] = []
        self._dropped = 0
        self._writing: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self._given: SimpleQueue[tuple[list[Line], int]] = SimpleQueue()
        """What the thread is to write: lines, and how many were dropped after them."""
        self._written = asyncio.Event()
        self._closing = asyncio.Event()

    def add(self, scope: Mapping[str, Any], status: int, size: int, seconds: float) -> None:
        """Add a line about a response."""
        if len(self._lines) >= MOST_HELD:
            self._dropped += 1
            return
        about = scope.get("state") or {}
        self._lines.append(
            Line(
                time.time(),
                scope["client"],
                scope.get("method", "WEBSOCKET"),
                scope.get("raw_path") or b"",
                scope.get("query_string") or b"",
                scope["http_version"],
                status,
                size,
                seconds,
                about.get("deployment", ""),
                about.get("request_id", ""),
            )
        )
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write_soon())

    async def close(self) -> None:
        """Write the lines that are left, if whoever reads them does so soon."""
        self._closing.set()
        if self._writing is not None:
            await asyncio.wait({self._writing}, timeout=_LAST_WORD_S)

    async def _write_soon(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                await self._closing.wait()
        if self._thread is None:
            write = partial(self._write, asyncio.get_running_loop())
            self._thread = threading.Thread(target=write, name="qserve-access-log", daemon=True)
            self._thread.start()
        while self._lines:
            self._written.clear()
            self._given.put((self._lines, self._dropped))
            self._lines, self._dropped = [], 0
            await self._written.wait()
        self._writing = None

    def _write(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            while True:
                lines, dropped = self._given.get()
                text = b"".join(map(self._put_into_words, lines))
                if dropped:
                    text += (b'{"dropped":%d}\n' if self._put_into_words is as_json else b"%d dropped\n") % dropped
                _write_all(self._descriptor, memoryview(text))
                loop.call_soon_threadsafe(self._written.set)


def _write_all(descriptor: int, text: memoryview) -> None:
    while text:
        try:
            text = text[os.write(descriptor, text) :]
        except BlockingIOError:  # standard output may be shared with a program that has set it so
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll()
        except OSError:
            return  # nobody reads them any more


def as_text(line: Line) -> bytes:
    """A line for people: address, request, status, bytes, time, deployment, request id."""
    client = f"{line.client[0]}:{line.client[1]}" if line.client else "-"
    return (
        f'{_time_of(line)} {client} "{line.method} {_target_of(line)} HTTP/{line.version}" {line.status} {line.size} '
        f"{line.seconds * 1000:.1f}ms {line.deployment or '-'} {line.request_id or '-'}\n"
    ).encode()


def as_short(line: Line) -> bytes:
    """A line for somebody who looks on: time of day, status, request, time, deployment."""
    time_of_day = datetime.fromtimestamp(line.at).astimezone().strftime("%H:%M:%S")
    return (
        f"{time_of_day} {line.status} {line.method} {_target_of(line)} {line.seconds * 1000:.1f} ms "
        f"{line.deployment or '-'}\n"
    ).encode()


def as_json(line: Line) -> bytes:
    """A line for programs."""
    return (
        msgspec.json.encode(
            {
                "time": _time_of(line),
                "client": line.client[0] if line.client else None,
                "method": line.method,
                "path": _target_of(line),
                "status": line.status,
                "bytes": line.size,
                "ms": round(line.seconds * 1000, 3),
                "deployment": line.deployment,
                "request_id": line.request_id,
            }
        )
        + b"\n"
    )


def _target_of(line: Line) -> str:
    # The gate lets no control characters through, so a line stays a line.
    target = line.path + b"?" + line.query if line.query else line.path
    return target.decode("latin-1").replace('"', "%22")


def _time_of(line: Line) -> str:
    return datetime.fromtimestamp(line.at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


_STYLES = {"short": as_short, "text": as_text, "json": as_json}
