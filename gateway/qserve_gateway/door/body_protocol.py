"""The bodies of requests: given to the parser, or read into the memory where they are to be."""

import asyncio
from collections.abc import Callable
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from qserve_gateway.door.direct import DirectProtocol
from qserve_gateway.door.gate import CHUNKED, LAST_CHUNK, ChunkedBody, LengthBody, Refusal
from qserve_gateway.door.limits import Door
from qserve_gateway.door.transport import TickTransport

MOST_UNWANTED = 1024 * 1024
"""How much of a body is read after its response; where more may come, the connection is closed instead."""
_NOT_PARSED = 64 * 1024
"""Bytes from which on a body of known length spares the parser, which would copy it and find nothing new."""
_NOWHERE = memoryview(b"")
_CONNECTION = "qserve.connection"
"""The extension of a request's scope by which `connection_of` finds its connection."""


class BodyReader(asyncio.BufferedProtocol):
    """Takes the place of a connection's protocol until all of `place` is filled, or somebody stops it.

    On its way through the parser and over ASGI a body is copied five times, which takes longer than receiving it.

    Args:
        protocol: Reads the connection before and after, and is told everything else meanwhile.
        place: Has room for the rest of the body, and no more.
        on_bytes: Called with how many bytes have arrived.

    Attributes:
        size: How many bytes have arrived.
        over: Done when no more will arrive in this way.
    """

    def __init__(
        self, protocol: asyncio.Protocol, transport: TickTransport, place: memoryview, on_bytes: Callable[[int], None]
    ) -> None:
        self._protocol = protocol
        self._transport = transport
        self._place = place
        self._on_bytes = on_bytes
        self.size = 0
        self.over = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        """Begin to read."""
        self._switch_to(self)

    def stop(self) -> None:
        """Let the protocol read what is still to come; without effect where this is over."""
        if not self.over.done():
            self._end()
            self._switch_to(self._protocol)

    def _end(self) -> None:
        self.over.set_result(None)
        # Connection and transport know this reader for longer: a view would keep the memory of a body that broke off.
        self._place = _NOWHERE

    def _switch_to(self, protocol: asyncio.BaseProtocol) -> None:
        self._transport.set_protocol(protocol)
        if not self._transport.is_closing():  # uvloop looks at the kind of protocol when it begins to read
            self._transport.pause_reading()
            self._transport.resume_reading()

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Where to put what comes next."""
        return self._place[self.size :]

    def buffer_updated(self, nbytes: int) -> None:
        """Go on, or end."""
        self.size += nbytes
        if self.size == len(self._place):
            self.stop()
        self._on_bytes(nbytes)

    def eof_received(self) -> bool | None:
        """As the protocol has it."""
        return self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """As the protocol has it."""
        if not self.over.done():
            self._end()
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        """As the protocol has it."""
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """As the protocol has it."""
        self._protocol.resume_writing()


class BodyProtocol(DirectProtocol):
    """uvicorn's HTTP/1.1 connection, which follows the bodies of requests to their ends by itself.

    Args:
        door: Its clock.
    """

    def __init__(self, door: Door, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._door = door
        self._body: LengthBody | ChunkedBody | None = None
        self._is_parsed = True
        """Whether the parser gets the body, too."""
        self._reader: BodyReader | None = None
        self._leaving = False
        self._keep_alive = True
        """Whether the connection is to be kept once `_body` is whole and its response has been sent."""
        self._received = 0
        """Bytes of the body that have arrived since `_since`."""
        self._since = 0.0
        """When the connection got into its present state: idle, in a head, in a body, refused."""
        self._heard = 0.0

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
        except HttpParserError as exc:
            raise Refusal(400, "it is not HTTP/1.1", "syntax") from exc

    def _begin_body(self, length: int) -> None:
        self._body = ChunkedBody() if length == CHUNKED else LengthBody(length)
        self._since = self._heard = self._door.now
        self._received = 0
        self._keep_alive = self.cycle.keep_alive
        if length == CHUNKED or length > MOST_UNWANTED:
            # A response that does not wait for all of it says that it is the last one: the rest may not be read.
            self.cycle.keep_alive = False
        self._is_parsed = length < _NOT_PARSED  # in chunks, too
        if not self._is_parsed:
            self.cycle.scope["extensions"] = {_CONNECTION: {_CONNECTION: self}}

    def _take_body(self, data: bytes) -> bytes:
        body = self._body
        assert body is not None
        self._heard = self._door.now
        self._received += len(data)
        part, rest = body.take(data)
        if body.done and isinstance(body, ChunkedBody):
            part += LAST_CHUNK
        if part and self._is_parsed:
            self._feed(part)
        elif part:
            self.on_body(part)
        if body.done:
            self._end_body()
        return rest

    def divert(self, place: memoryview) -> BodyReader | None:
        """Read the rest of the body that comes in into `place`; None where it does not belong there."""
        body = self._body
        if not isinstance(body, LengthBody) or self._is_parsed or body.left != len(place) or self.cycle.body:
            return None
        self.flow.resume_reading()  # else it would not pause for what comes after the body
        self._reader = BodyReader(self, self.transport, place, self._note_body)
        self._reader.start()
        return self._reader

    def _note_body(self, size: int) -> None:
        body = self._body
        assert isinstance(body, LengthBody)
        self._heard = self._door.now
        self._received += size
        body.left -= size
        if not body.left:
            self._end_body()

    def _end_body(self) -> None:
        if not self._is_parsed:
            self.on_message_complete()
            self.parser = HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._body = self._reader = None
        self._since = self._door.now
        self.transport.close_gently = None
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._keep_alive and not self._leaving


def cycle_of(function: Receive | Send) -> RequestResponseCycle | None:
    """The request whose connection an application's `receive` or `send` is; None if a middleware is around it."""
    found = getattr(function, "__self__", None)
    return found if isinstance(found, RequestResponseCycle) else None


def connection_of(scope: Scope, receive: Receive) -> BodyProtocol | None:
    """The connection over which a large body comes in, if nobody else has to see it: see `BodyProtocol.divert`."""
    found: BodyProtocol | None = None
    if cycle_of(receive) is not None:
        found = scope.get("extensions", {}).get(_CONNECTION, {}).get(_CONNECTION)
    return found
