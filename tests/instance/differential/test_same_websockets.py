"""WebSockets behind the gateway as under plain uvicorn: the same messages, the same ends."""

from dataclasses import dataclass
from socket import create_connection
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from tests.instance.differential.answer import NOT_COMPARED
from tests.instance.differential.catalogue import Topic, load_topics
from tests.instance.differential.sides import Sides
from tests.support.slowness import patience

SOCKETS = tuple(topic for topic in load_topics() if topic.name == "sockets")

_OF_THE_CONNECTION = NOT_COMPARED.keys() | {"upgrade", "sec-websocket-accept", "sec-websocket-extensions"}
_LIMIT_S = 20


@dataclass(frozen=True)
class Talk:
    """What a client says and does.

    Attributes:
        says: Messages; each waits for an answer before the next one.
        close: Code with which the client closes; None: it waits for the other side to do so.
    """

    name: str
    target: str
    says: tuple[str | bytes, ...] = ()
    close: int | None = None
    offers: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()


TALKS = [
    Talk("text and bytes", "/echo", ("text", b"\0\xff", "\u20ac", "", b"", "x" * 100_000), close=1000),
    Talk("a close code of the client's", "/echo", ("x",), close=4123),
    Talk("what it knows", "/scope/%C3%BC?number=3", headers=(("Cookie", "a=b"),)),
    Talk("a subprotocol", "/scope/x", offers=("v1", "v2")),
    Talk("a parameter that is not valid", "/scope/x?number=y"),
    Talk("closed with 1000", "/close/1000"),
    Talk("closed with 1001", "/close/1001"),
    Talk("closed with 4999", "/close/4999"),
    Talk("refused", "/refuse"),
    Talk("a dependency lets it in", "/token?token=t"),
    Talk("a dependency refuses", "/token"),
    Talk("a bug", "/bug"),
    Talk("a bug before it is accepted", "/bug-before"),
    Talk("ends by returning", "/returns"),
    Talk("returns before it is accepted", "/returns-before"),
    Talk("no such route", "/nowhere"),
]

DIFFERENT = {
    "a bug": "closed with 1011, where uvicorn cuts the connection without a close frame",
    "ends by returning": "closed with 1000, where uvicorn cuts the connection without a close frame",
}
"""Talks that differ on purpose, by name, and why."""


@pytest.mark.parametrize("talk", TALKS, ids=lambda talk: talk.name)
def test_the_talk_is_that_of_plain_uvicorn(sides: Sides, talk: Talk) -> None:
    sides.deploy(SOCKETS)
    plain, gateway = (_talk(address, SOCKETS[0], talk) for address in sides.addresses)
    assert (gateway == plain) == (talk.name not in DIFFERENT), f"{gateway}, under plain uvicorn {plain}"


def _talk(address: tuple[str, int], topic: Topic, talk: Talk) -> list[Any]:
    """Everything the client learns, in order."""
    heard: list[Any] = []
    url = f"ws://apps.example:8080{topic.prefix}{talk.target}"
    offers = [Subprotocol(name) for name in talk.offers] or None
    try:
        socket = connect(
            url,
            sock=create_connection(address, patience(_LIMIT_S)),
            subprotocols=offers,
            additional_headers=talk.headers,
        )
    except InvalidStatus as exc:
        return ["denied", exc.response.status_code, bytes(exc.response.body or b"")]
    with socket:
        assert socket.response is not None
        headers = [(name.lower(), value) for name, value in socket.response.headers.raw_items()]
        heard.append(sorted(pair for pair in headers if pair[0] not in _OF_THE_CONNECTION))
        heard.append(socket.subprotocol)
        try:
            for message in talk.says:
                socket.send(message)
                heard.append(socket.recv(patience(_LIMIT_S)))
            if talk.close is not None:
                socket.close(talk.close, "bye")
            while True:
                heard.append(socket.recv(patience(_LIMIT_S)))
        except ConnectionClosed as exc:
            heard.append((exc.rcvd and (exc.rcvd.code, exc.rcvd.reason), exc.sent and exc.sent.code))
    return heard
