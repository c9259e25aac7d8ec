"""Bodies in parts: what each side is told when the other one leaves, breaks off or sends too much."""

import asyncio
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from qserve.errors import PayloadTooLarge, QServeError, StreamBroken
from qserve.wire.channel import ABORT, DATA, END, HELLO, Channel, Chunk
from qserve.wire.messages import HttpResponse, encode
from qserve_gateway.bodies.streaming import (
    ClientDisconnected,
    OneLinePerCut,
    ResponseCut,
    Upload,
    read_beginning,
    stream_response,
)
from tests.pure.test_direct import GET, Connection
from tests.pure.test_gateway_app import FakeCalls

LEFT: Message = {"type": "http.disconnect"}


def body(data: bytes, *, more: bool = True) -> Message:
    return {"type": "http.request", "body": data, "more_body": more}


def receiving(*messages: Message) -> Receive:
    """Give these messages, and then none."""
    left: Iterator[Message] = iter(messages)

    async def receive() -> Message:
        message = next(left, None)
        return message if message is not None else await asyncio.Future()

    return receive


class Stream:
    """The gateway's end of a channel whose replica has said hello, and what became of it."""

    def __init__(self) -> None:
        self.told: list[Chunk] = []
        self.channel = Channel("gateway", lambda _peer, chunk: self.told.append(chunk))
        self.channel.feed(Chunk("replica", HELLO))
        self.sent: list[Message] = []

    def feed(self, *data: bytes, end: bool = False) -> None:
        for number, each in enumerate(data):
            self.channel.feed(Chunk("replica", DATA, number, each))
        if end:
            self.channel.feed(Chunk("replica", END, len(data)))

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def respond(self, receive: Receive | None = None) -> None:
        await asyncio.wait_for(stream_response(self.send, receive, self.channel, "GET", "one"), 10)


HEAD = encode(HttpResponse(200, [(b"content-type", b"text/plain")], b""))


async def test_the_beginning_of_a_body_is_read_as_far_as_it_fits() -> None:
    async def read(*messages: Message, declared: int = 0) -> tuple[bytes, bool]:
        return await read_beginning(receiving(*messages), declared=declared, most=4, limit=8)

    assert await read(body(b"ab"), body(b"cd", more=False)) == (b"abcd", False)
    assert await read(body(b"ab"), body(b"cde"), body(b"never read")) == (b"abcde", True)
    with pytest.raises(PayloadTooLarge, match="over the limit of 8 bytes"):
        await read(body(b"x" * 9, more=False))
    with pytest.raises(PayloadTooLarge, match="over the limit of 8 bytes"):
        await read(declared=9)
    with pytest.raises(ClientDisconnected):
        await read(body(b"a"), LEFT)


@pytest.mark.parametrize(
    ("messages", "kinds", "error"),
    [
        ((body(b"ab"), body(b""), body(b"c", more=False), {"type": "other"}, LEFT), [DATA, DATA, END, ABORT], None),
        ((body(b"ab"), LEFT), [DATA, ABORT], None),
        ((body(b"ab"), body(b"x" * 7)), [DATA, ABORT], PayloadTooLarge),
    ],
    ids=["whole, then the client leaves", "the client leaves in the middle", "too large"],
)
async def test_what_the_replica_of_an_upload_and_its_request_are_told(
    messages: tuple[Message, ...], kinds: list[int], error: type[QServeError] | None
) -> None:
    stream = Stream()
    ended: asyncio.Future[QServeError | None] = asyncio.get_running_loop().create_future()
    upload = Upload(stream.channel, receiving(*messages), sent=0, limit=8, on_end=ended.set_result)
    upload.start()
    said = await asyncio.wait_for(ended, 10)
    assert [chunk.kind for chunk in stream.told] == kinds
    assert type(said) is (error or type(None))
    await upload.stop()


async def test_a_response_is_written_part_by_part() -> None:
    stream = Stream()
    stream.feed(HEAD, b"a", b"b", end=True)
    await stream.respond(receiving())
    assert [message.get("body") for message in stream.sent] == [None, b"a", b"b", b""]


@pytest.mark.parametrize("parts", [(), (HEAD, b"a")], ids=["before its beginning", "after it"])
async def test_a_response_whose_rest_never_comes_is_cut(parts: tuple[bytes, ...]) -> None:
    stream = Stream()
    stream.feed(*parts)
    stream.channel.feed(Chunk("replica", ABORT, 0, b"the replica died"))
    with pytest.raises(ResponseCut, match="the response to request one was cut: the replica died"):
        await stream.respond()
    assert b"" not in [message.get("body") for message in stream.sent]


async def test_a_response_without_a_beginning_is_cut() -> None:
    stream = Stream()
    stream.feed(end=True)
    with pytest.raises(ResponseCut, match="its beginning was lost"):
        await stream.respond()


async def test_a_streamed_response_that_cannot_be_sent_is_another_one() -> None:
    stream = Stream()
    stream.feed(encode(HttpResponse(200, [(b"x", b"a\r\nb: c")], b"")), b"a")
    await stream.respond()
    assert stream.sent[0]["status"] == 500
    assert stream.told[-1].kind == ABORT


async def test_a_client_that_leaves_ends_its_response_without_an_error() -> None:
    stream = Stream()
    stream.feed(HEAD)
    await stream.respond(receiving(body(b"", more=False), LEFT))
    assert stream.told[-1] == Chunk("gateway", ABORT, 0, b"the client left")


def test_a_cut_response_is_one_line_in_the_log() -> None:
    def record(error: BaseException) -> logging.LogRecord:
        return logging.LogRecord(
            "uvicorn", logging.ERROR, "", 1, "Exception in %s", ("app",), (type(error), error, None)
        )

    for error, said in ((ResponseCut("cut here"), "cut here"), (asyncio.CancelledError(), "this gateway is leaving")):
        cut = record(error)
        assert OneLinePerCut().filter(cut)
        assert (said in cut.getMessage(), cut.levelname, cut.exc_info) == (True, "WARNING", None)
    other = record(StreamBroken("else"))
    assert OneLinePerCut().filter(other)
    assert (other.getMessage(), other.levelname) == ("Exception in app", "ERROR")


def test_the_invalid_utf_8_of_a_client_is_not_in_the_log() -> None:
    """As are none of the other ways in which clients break the rules of WebSockets."""
    text = "Invalid UTF-8 sequence received from client."
    assert text in inspect.getsource(WebSocketsSansIOProtocol.send_receive_event_to_app)
    error = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    for said, is_kept in ((text, False), ("Exception in ASGI application", True)):
        record = logging.LogRecord("uvicorn", logging.ERROR, "", 1, said, (), (type(error), error, None))
        assert OneLinePerCut().filter(record) is is_kept


# HTTP/1.0


def parts_of(*parts: bytes, headers: tuple[tuple[bytes, bytes], ...] = (), cut: bool = False) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(headers)})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        if cut:
            raise ResponseCut("cut")
        await send({"type": "http.response.body", "body": b"end"})

    return app


@pytest.mark.parametrize("headers", [(), ((b"Content-Length", b"5"),)], ids=["without a length", "with one"])
async def test_a_response_to_http_1_0_has_no_chunks_and_ends_with_its_connection(
    headers: tuple[tuple[bytes, bytes], ...],
) -> None:
    connection = Connection(FakeCalls(), direct=False)
    protocol: Any = connection.protocol
    protocol.app = parts_of(b"a", b"b", headers=headers)
    head, _, content = (await connection.answered(GET.replace(b"1.1", b"1.0"))).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert (b"content-length" in head.lower()) is bool(headers)
    assert content == b"abend"
    assert connection.socket.is_closing()


async def test_a_response_to_http_1_0_that_is_cut_is_an_error_to_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = Connection(FakeCalls(), direct=False)
    protocol: Any = connection.protocol
    protocol.app = parts_of(b"a", cut=True)
    reset = asyncio.Event()
    monkeypatch.setattr(protocol._client_end, "reset", reset.set)
    protocol.data_received(GET.replace(b"1.1", b"1.0"))
    await asyncio.wait_for(reset.wait(), 10)
    assert connection.socket.written.endswith(b"\r\n\r\na")
