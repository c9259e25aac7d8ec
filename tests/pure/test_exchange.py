"""A request and its response as an ASGI application sees them, once its client has left or reads slowly."""

import asyncio

import pytest

from qserve.errors import StreamBroken
from qserve.wire.channel import WINDOW, Channel, Chunk
from qserve.wire.messages import HttpRequest, decode_http_response
from qserve_workers.user.asgi import ClientLeft, Exchange

PART = {"type": "http.response.body", "body": b"part", "more_body": True}


def left(body: bytes = b"") -> Exchange:
    """An exchange whose client has left."""
    channel = Channel("replica", lambda _to, _chunk: None, "gateway")
    channel.close(StreamBroken("the client left"))
    return exchange_over(channel, body)


def exchange_over(channel: Channel, body: bytes = b"") -> Exchange:
    request = HttpRequest("POST", "/", b"/", b"", [], "", "http", None, None, "1.1", "id-1", body)
    return Exchange(request, lambda: channel)


async def test_what_is_sent_to_a_client_that_has_left_is_dropped_for_some_time() -> None:
    exchange = left()
    await exchange.send({"type": "http.response.start", "status": 200})
    for _ in range(3):
        await exchange.send(PART)

    exchange._unread_until = asyncio.get_running_loop().time() - 1
    with pytest.raises(ClientLeft, match="the client left"):
        await exchange.send(PART)


async def test_who_gives_up_sending_does_not_take_the_beginning_of_the_response_with_him() -> None:
    sent, has_begun = list[Chunk](), asyncio.Event()

    def transmit(_to: str, chunk: Chunk) -> None:
        sent.append(chunk)
        has_begun.set()

    channel = Channel("replica", transmit, "gateway")
    exchange = exchange_over(channel)
    await exchange.send({"type": "http.response.start", "status": 202})
    await exchange.send({**PART, "body": b"x" * 2 * WINDOW})
    second = asyncio.create_task(exchange.send(PART))
    await has_begun.wait()

    second.cancel()
    await asyncio.wait((second,))

    channel.close(StreamBroken("the client left"))
    await exchange.settle()
    assert second.cancelled()
    assert exchange.client_has_left
    assert decode_http_response(sent[0].data).status == 202
