"""An HTTP/1.1 client that tells more than others: how a connection broke, and answers that nobody asked for."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import httptools

_REUSED_WITHIN_S = 4.0
"""Gateways close a connection that is idle for 5 s. It counts from the last request, because a process that is held up
reads the response late."""

_HELD_UP_S = 0.5
"""A request that this process itself has held back for so long may have met a connection that was closed as idle."""


class Response(NamedTuple):
    """A whole response."""

    status: int
    headers: dict[str, str]
    body: bytes


class Broken(Exception):
    """The connection broke; `begun` if that was in the middle of a response."""

    def __init__(self, begun: bool, why: str) -> None:
        super().__init__(why)
        self.begun = begun


class _Connection(asyncio.Protocol):
    def __init__(self, on_surplus: Callable[[bytes], None]) -> None:
        self._on_surplus = on_surplus
        self.waiting: asyncio.Future[Response] | None = None
        self.transport: asyncio.Transport
        self.asked_at = time.monotonic()
        self.usable = True
        self.held_up_s = 0.0
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._body = bytearray()
        self._begun = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none of asyncio's classes

    def data_received(self, data: bytes) -> None:
        if self.waiting is None:
            self.usable = False
            self._on_surplus(data)
            return
        self._begun = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._fail(f"not HTTP: {exc}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(str(exc or "closed"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self.usable = self.usable and self._parser.should_keep_alive()
        response = Response(self._parser.get_status_code(), self._headers, bytes(self._body))
        waiting, self.waiting = self.waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(response)

    def _fail(self, why: str) -> None:
        self.usable = False
        self.transport.close()
        waiting, self.waiting = self.waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_exception(Broken(self._begun, why))

    async def ask(self, request: bytes) -> Response:
        self._reset()
        loop = asyncio.get_running_loop()
        self.waiting = loop.create_future()
        self.asked_at = time.monotonic()
        self.transport.write(request)
        loop.call_soon(self._note_delay)
        return await self.waiting

    def _note_delay(self) -> None:
        # uvloop writes at the end of a tick; while one takes long, the gateway may close what it finds idle.
        self.held_up_s = time.monotonic() - self.asked_at


class HttpClient:
    """Connections to one gateway, kept alive.

    Args:
        on_surplus: Gets what comes over a connection on which nothing is asked: an answer too many.
    """

    def __init__(self, url: str, on_surplus: Callable[[bytes], None]) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._on_surplus = on_surplus
        self._idle: list[_Connection] = []

    async def ask(
        self, method: str, path: str, headers: dict[str, str], timeout_s: float, body: bytes = b""
    ) -> Response:
        """Send a request and wait for its response.

        Raises:
            Broken: There is no whole response.
            TimeoutError: There is none in time.
        """
        lines = [f"{method} {path} HTTP/1.1", f"host: {self._host}:{self._port}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if method == "POST" or body:
            lines.append(f"content-length: {len(body)}")
        request = ("\r\n".join(lines) + "\r\n\r\n").encode() + body
        async with asyncio.timeout(timeout_s):
            connection = await self._connection()
            try:
                response = await connection.ask(request)
            except asyncio.CancelledError:
                connection.usable = False
                connection.transport.abort()
                raise
            except Broken as exc:
                if exc.begun or connection.held_up_s < _HELD_UP_S:
                    raise
                connection = await self._connection(new=True)
                response = await connection.ask(request)
        if connection.usable:
            self._idle.append(connection)
        else:
            connection.transport.close()
        return response

    def close(self) -> None:
        """Close what is idle."""
        for connection in self._idle:
            connection.transport.close()

    async def _connection(self, *, new: bool = False) -> _Connection:
        while self._idle and not new:
            connection = self._idle.pop()
            if connection.usable and time.monotonic() - connection.asked_at < _REUSED_WITHIN_S:
                return connection
            connection.transport.close()
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            _, made = await loop.create_connection(lambda: _Connection(self._on_surplus), self._host, self._port)
            return made
        raise Broken(False, "cannot connect")
