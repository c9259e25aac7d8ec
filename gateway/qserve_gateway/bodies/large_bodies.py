"""Large bodies in memory that gateway and replica share: of requests, read into it, and of responses, written from it.

Redis does not see them. Where the two do not live on one host, lending sees to it that they are sent.
"""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import msgspec
from starlette.types import Receive, Send

from qserve.broker.large.lending import Lending, Loan
from qserve.errors import PayloadTooLarge
from qserve.values.segments import Segment
from qserve.wire.messages import HttpRequest, LargeReply, decode_http_response, encode
from qserve.wire.parts import Source
from qserve_gateway.bodies.streaming import PATIENCE_S, PAUSE_S, ClientDisconnected, body_too_large
from qserve_gateway.door.body_protocol import BodyProtocol, BodyReader, cycle_of
from qserve_gateway.door.transport import WRITTEN_AT_ONCE
from qserve_gateway.respond import Unsendable, send_response, start_message

_LARGEST = 64 * 2**20
_MOST = 512 * 2**20
"""Bytes of one body, and of all that are read or used in this way at a time; others are sent on as they come in, so
that large uploads do not take all memory."""
_LEFT = "the client left before the body of its request was whole"
_STEP = 1024 * 1024
"""Bytes of a response that are written at a time, with time for other requests in between."""


class LargeBody:
    """The body of a request, in memory that is lent with the call.

    Attributes:
        size: How many bytes have been read.
    """

    def __init__(self, lending: Lending, request: HttpRequest, length: int, least: int) -> None:
        self._lending = lending
        self._request = request
        self._least = least
        self._head_size = len(encode(request))
        self.length = length
        self.size = 0
        self._segment: Segment | None
        self._segment, self._places = lending.reserve([self._head_size, length])

    async def read(self, receive: Receive, connection: BodyProtocol | None = None) -> bool:
        """Read it, as long as it comes in without a pause; returns whether it is whole.

        Args:
            connection: Where it comes in, if nobody else has to see it.

        Raises:
            ClientDisconnected: The client has left.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + PATIENCE_S
        try:
            async with asyncio.timeout(PAUSE_S) as pause:
                while self._take_in(await receive()):
                    if connection is not None and (reader := connection.divert(self._rest())) is not None:
                        pause.reschedule(None)
                        return await self._read_all(reader, end)
                    pause.reschedule(min(end, loop.time() + PAUSE_S))
        except TimeoutError:
            return False
        return True

    def _rest(self) -> memoryview:
        assert self._segment is not None
        return self._segment.read(self._places[1] + self.size, self.length - self.size)

    async def _read_all(self, reader: BodyReader, end: float) -> bool:
        """Let the connection fill the rest, with the same patience."""
        loop, whole, before = asyncio.get_running_loop(), self.length - self.size, -1
        try:
            while not reader.over.done() and reader.size != before and loop.time() < end:
                before = reader.size
                await asyncio.wait((reader.over,), timeout=PAUSE_S)
        finally:
            is_over = reader.over.done()
            reader.stop()
            self.size += reader.size
            if self._segment is not None:
                self._segment.note_written(self._places[1] + self.size)
        if reader.size < whole and is_over:
            raise ClientDisconnected(_LEFT)
        return reader.size == whole

    def _take_in(self, message: MutableMapping[str, Any]) -> bool:
        if message["type"] == "http.disconnect":
            raise ClientDisconnected(_LEFT)
        assert self._segment is not None
        part = message.get("body", b"")
        if self.size + len(part) > self.length:
            raise body_too_large(self.length)
        self._segment.write(self._places[1] + self.size, part)
        self.size += len(part)
        more: bool = message.get("more_body", False)
        return more

    def payload(self, *, follows: bool) -> Loan | bytes:
        """The payload of the call: the request with what has been read of its body.

        Args:
            follows: The rest of the body follows.
        """
        segment = self._segment
        assert segment is not None
        request = msgspec.structs.replace(self._request, body_follows=follows)
        if self.size <= self._least:
            body = bytes(segment.read(self._places[1], self.size))
            return encode(msgspec.structs.replace(request, body=body))
        segment.write(self._places[0], encode(request))
        self._segment = None
        return self._lending.publish(segment, [self._head_size, self.size])

    def close(self) -> None:
        """Give its memory back, unless it was lent."""
        segment, self._segment = self._segment, None
        if segment is not None:
            self._lending.abandon(segment)


class LargeBodies:
    """The large bodies that a gateway reads at a time.

    Args:
        least: Bytes that a queue may carry: a body of so many needs none of this.
        limit: Most bytes of a body.
    """

    def __init__(self, least: int, limit: int) -> None:
        self._least = least
        self._largest = min(limit, _LARGEST)
        self._bytes = 0

    def begin(self, lending: Lending, request: HttpRequest, length: int) -> LargeBody | None:
        """Make room for a body of so many bytes; None if it is to be sent on as it comes in.

        Args:
            lending: Lends it to the replica.
        """
        if not self._least < length <= self._largest or self._bytes + length > _MOST:
            return None
        try:
            body = LargeBody(lending, request, length, self._least)
        except PayloadTooLarge:
            return None
        self._bytes += length
        return body

    def end(self, body: LargeBody) -> None:
        """The request of a body is answered."""
        self._bytes -= body.length
        body.close()


class LargeResponse:
    """A response whose body is in the memory of its replica, and is written from there, no faster than it is read."""

    __slots__ = ("_reply",)

    def __init__(self, reply: LargeReply) -> None:
        reply.payload.hold()
        self._reply = reply

    async def write(self, send: Send, receive: Receive, method: str, request_id: str) -> None:
        """Write it; one that could be taken for two responses, or for none, becomes a 500."""
        source = self._reply.payload
        try:
            await self._write(source, send, method, request_id)
        except BaseException:
            source.keep()  # the connection may go on to write what it has been given
            raise
        finally:
            source.drop()

    async def _write(self, source: Source, send: Send, method: str, request_id: str) -> None:
        response = decode_http_response(source.head)
        size = source.size_of(1)
        if not size:  # only together with its headers it is large
            await send_response(send, response, method, request_id)
            return
        headers = [*response.headers, (b"content-length", b"%d" % size)]
        response = msgspec.structs.replace(response, headers=headers)
        try:
            await send(start_message(response, method, request_id, streamed=True))
        except Unsendable:
            await send_response(send, response, method, request_id)
            return
        has_body = method != "HEAD" and response.status not in {204, 304}
        await _send_body(send, source.view(1) if has_body else memoryview(b""))


async def _send_body(send: Send, body: memoryview) -> None:
    cycle = cycle_of(send)
    if cycle is None:  # a middleware gets bytes, as ASGI has it
        for start in range(0, len(body), _STEP):
            await send(_part(bytes(body[start : start + _STEP]), more=True))
        await send(_part(b"", more=False))
        return
    # With these limits a connection that has taken a message holds nothing of the one before.
    cycle.transport.set_write_buffer_limits(0)
    try:
        for start in range(0, len(body), _STEP):
            if start:
                await asyncio.sleep(0)  # others have their turn
            piece = body[start : start + _STEP]
            await send(_part(piece if len(piece) >= WRITTEN_AT_ONCE else bytes(piece), more=True))
        await send(_part(b"", more=False))
    finally:
        cycle.transport.set_write_buffer_limits()


def _part(body: bytes | memoryview, *, more: bool) -> MutableMapping[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}
