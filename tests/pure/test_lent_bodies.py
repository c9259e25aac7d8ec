"""Large bodies between gateway and replica: read into memory that is lent, and written from it."""

import asyncio
import gc
import socket
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import uvicorn
import uvloop
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from qserve.broker.keys import Keys
from qserve.broker.large.lending import Lending, Loan
from qserve.settings import Settings
from qserve.values.borrowing import Borrowed, Borrowing
from qserve.values.segments import COPIED, HELD, Segment
from qserve.wire.messages import (
    HTTP_RESPONSE,
    HttpRequest,
    HttpResponse,
    LargeReply,
    Signer,
    decode_http_request,
    decode_lent,
    pack_http,
    unpack_http,
)
from qserve_gateway.bodies import large_bodies
from qserve_gateway.bodies.large_bodies import LargeBodies, LargeResponse
from qserve_gateway.bodies.streaming import ClientDisconnected
from qserve_gateway.door.body_protocol import BodyReader
from qserve_gateway.door.limits import Door
from qserve_gateway.door.protocol import HttpProtocol
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S

MIB = 2**20
LEAST = 1000
REQUEST = HttpRequest("POST", "/", b"/", b"", [(b"a", b"b")], "", "http", None, None, "1.1", "id", b"")
BODY = bytes(range(256)) * 8 * 1024


@pytest.fixture
def lending() -> Iterator[Lending]:
    made = Lending("me", "redis://nowhere", Keys("test"), Signer())
    yield made
    made.stop()


@pytest.fixture
def bodies() -> LargeBodies:
    return LargeBodies(LEAST, limit=128 * MIB)


def opened(loan: Loan) -> Borrowed:
    return Borrowing().open(decode_lent(loan.frame), returns=True)


class Client:
    """Sends a body in pieces of 64 KiB, and then does what it is told."""

    def __init__(self, body: bytes, length: int = 0) -> None:
        step = 65536
        self._pieces = [body[at : at + step] for at in range(0, len(body), step)]
        self._left = (length or len(body)) - len(body)
        self.leaves = False

    async def receive(self) -> dict[str, Any]:
        if self._pieces:
            piece = self._pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(self._pieces or self._left)}
        if not self.leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}


async def test_a_body_that_comes_in_at_once_is_lent_with_its_request(bodies: LargeBodies, lending: Lending) -> None:
    body = bodies.begin(lending, REQUEST, len(BODY))
    assert body is not None
    assert await body.read(Client(BODY).receive)
    loan = body.payload(follows=False)
    assert isinstance(loan, Loan)
    request = unpack_http(decode_http_request, opened(loan))
    assert request.body == BODY
    assert (request.headers, request.body_follows) == (REQUEST.headers, False)


@pytest.mark.parametrize("there", [LEAST, MIB])
async def test_of_one_that_pauses_the_application_gets_what_there_is(
    bodies: LargeBodies, lending: Lending, there: int
) -> None:
    body = bodies.begin(lending, REQUEST, len(BODY))
    assert body is not None
    assert not await body.read(Client(BODY[:there], len(BODY)).receive)
    payload = body.payload(follows=True)
    request = unpack_http(decode_http_request, opened(payload) if isinstance(payload, Loan) else payload)
    assert isinstance(payload, Loan) == (there > LEAST)
    assert (request.body, request.body_follows, body.size) == (BODY[:there], True, there)


async def test_its_memory_is_used_again_when_the_client_leaves(bodies: LargeBodies, lending: Lending) -> None:
    body = bodies.begin(lending, REQUEST, len(BODY))
    assert body is not None
    client = Client(BODY[:MIB], len(BODY))
    client.leaves = True
    with pytest.raises(ClientDisconnected):
        await body.read(client.receive)
    bodies.end(body)
    again, _ = lending.reserve([100, len(BODY)])
    assert again.generation == 2


def test_small_ones_huge_ones_and_too_many_are_sent_on_as_they_come_in(
    bodies: LargeBodies, lending: Lending, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bodies.begin(lending, REQUEST, LEAST) is None
    assert bodies.begin(lending, REQUEST, 64 * MIB + 1) is None
    monkeypatch.setattr(large_bodies, "_MOST", 3 * MIB)
    first = bodies.begin(lending, REQUEST, 2 * MIB)
    assert first is not None
    assert bodies.begin(lending, REQUEST, 2 * MIB) is None
    bodies.end(first)
    assert bodies.begin(lending, REQUEST, 2 * MIB) is not None


@pytest.mark.parametrize("end", ["connection_lost", "stop"])
async def test_a_reader_that_has_ended_keeps_no_memory(end: str) -> None:
    """Its connection, which is part of a cycle, is collected much later where little happens."""
    segment = Segment(MIB)
    reader = BodyReader(asyncio.Protocol(), Mock(), segment.read(64, 1000), lambda _size: None)
    reader.get_buffer(1000)[:10] = bytes(10)
    reader.buffer_updated(10)

    reader.stop() if end == "stop" else reader.connection_lost(None)

    segment.close()
    assert reader.size == 10
    assert segment._map.closed, "there is still a view of it"


class TestResponses:
    async def written(self, response: LargeResponse, method: str) -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await response.write(send, Client(b"").receive, method, "id")
        return sent

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    async def test_they_are_written_piece_by_piece_with_their_length(self, lending: Lending, method: str) -> None:
        packed = pack_http(HttpResponse(200, [(b"content-length", b"7"), (b"x", b"y")], BODY), LEAST)
        loan = lending.lend_result(packed)
        response = LargeResponse(LargeReply("call", HTTP_RESPONSE, opened(loan)))
        assert loan.segment.state == HELD, "a replica that stops would wait for a client that reads slowly"

        start, *pieces = await self.written(response, method)

        assert start["status"] == 200
        assert dict(start["headers"])[b"content-length"] == b"%d" % len(BODY)
        assert dict(start["headers"])[b"x"] == b"y"
        assert b"".join(piece["body"] for piece in pieces) == (b"" if method == "HEAD" else BODY)
        assert [piece.get("more_body", False) for piece in pieces][-1] is False
        assert len(pieces) == 1 if method == "HEAD" else len(pieces) > 2
        del response
        gc.collect()
        assert loan.segment.state == COPIED

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    async def test_one_that_is_large_by_its_headers_only_is_whole(self, lending: Lending, method: str) -> None:
        body = BODY[:LEAST]
        packed = pack_http(HttpResponse(201, [(b"content-length", b"1000"), (b"x", b"y" * LEAST)], body), LEAST)
        response = LargeResponse(LargeReply("call", HTTP_RESPONSE, opened(lending.lend_result(packed))))

        start, *pieces = await self.written(response, method)

        assert start["status"] == 201
        assert dict(start["headers"])[b"content-length"] == b"1000"
        assert b"".join(piece["body"] for piece in pieces) == (b"" if method == "HEAD" else body)

    async def test_one_that_cannot_be_sent_becomes_a_500(self, lending: Lending) -> None:
        loan = lending.lend_result(pack_http(HttpResponse(200, [(b"a\r\nb", b"")], BODY), LEAST))
        start, *_ = await self.written(LargeResponse(LargeReply("call", HTTP_RESPONSE, opened(loan))), "GET")
        assert start["status"] == 500

    @pytest.mark.parametrize("size", [*range(128 * 1024, 384 * 1024, 16 * 1024), 2 * MIB, 2 * MIB + 7])
    def test_the_connection_holds_nothing_of_one_that_is_written(self, lending: Lending, size: int) -> None:
        """Its replica uses the memory again; uvloop sends from it, as far as the network has not taken it before."""
        body = BODY[:5] * (size // 5 + 1)
        loan = lending.lend_result(pack_http(HttpResponse(200, [], body[:size]), LEAST))

        async def app(_scope: Scope, receive: Receive, send: Send) -> None:
            await LargeResponse(LargeReply("call", HTTP_RESPONSE, opened(loan))).write(send, receive, "GET", "id")
            for part in loan.parts():
                part[:] = bytes(len(part))

        async def answered() -> bytes:
            server, client = socket.socketpair()
            config = uvicorn.Config(app, lifespan="off", log_config=None, interface="asgi3", proxy_headers=False)
            config.load()
            door = Door(Settings(), has_log=False)
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: HttpProtocol(door, config=config, server_state=ServerState(), app_state={}), server
            )
            reader, writer = await asyncio.open_connection(sock=client)
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            async with asyncio.timeout(patience(LIMIT_S)):
                _, received = await reader.readuntil(b"\r\n\r\n"), await reader.readexactly(size)
            writer.close()
            return received

        loop = uvloop.new_event_loop()
        try:
            assert loop.run_until_complete(answered()) == body[:size]
        finally:
            loop.close()
