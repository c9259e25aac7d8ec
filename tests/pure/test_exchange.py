"""A request and its response as an ASGI application sees them, once its client has left."""

import asyncio

import pytest

from qserve.errors import StreamBroken
from qserve.wire.channel import Channel
from qserve.wire.messages import HttpRequest
from qserve_workers.user.asgi import ClientLeft, Exchange

PART = {"type": "http.response.body", "body": b"part", "more_body": True}


def left(body: bytes = b"") -> Exchange:
    """An exchange whose client has left."""
    channel = Channel("replica", lambda _to, _chunk: None, "gateway")
    channel.close(StreamBroken("the client left"))
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
