"""The gateway between a WebSocket's client and its replica: whoever ends it, the other side hears how."""

import asyncio
from typing import Any

import pytest
from starlette.types import Message
from websockets.frames import Close

from qserve.errors import StreamBroken
from qserve.wire.messages import HttpResponse, WebSocketEvent, decode_websocket_event, encode
from qserve_gateway import websocket
from qserve_gateway.websocket import WebSocketBridge, deny
from tests.support.waiting import until

ACCEPT = WebSocketEvent("accept", subprotocol="chat", headers=[(b"x-a", b"b")])


class Replica:
    """The channel to a replica, which says what a test lets it say."""

    def __init__(self, *says: WebSocketEvent | Exception | None) -> None:
        self.says: asyncio.Queue[WebSocketEvent | Exception | None] = asyncio.Queue()
        for each in says:
            self.says.put_nowait(each)
        self.heard: list[WebSocketEvent] = []
        self.has_ended = False
        self.aborted = ""
        self.reads = True

    async def receive(self) -> bytes | None:
        said = await self.says.get()
        if isinstance(said, Exception):
            raise said
        return None if said is None else encode(said)

    async def send(self, data: bytes) -> None:
        if not self.reads:
            await asyncio.Event().wait()
        self.heard.append(decode_websocket_event(data))

    async def end(self) -> None:
        self.has_ended = True

    def abort(self, reason: str) -> None:
        self.aborted = reason


class Client:
    """The ASGI server's side of a WebSocket."""

    def __init__(self, *messages: Message) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        for each in messages:
            self.messages.put_nowait(each)
        self.got: list[Message] = []
        self.has_left = False

    async def receive(self) -> Message:
        return await self.messages.get()

    async def send(self, message: Message) -> None:
        if self.has_left:
            raise OSError("the client has left")
        self.got.append(message)

    def types(self) -> list[str]:
        return [message["type"].removeprefix("websocket.") for message in self.got]


def between(client: Client, replica: Any) -> WebSocketBridge:
    return WebSocketBridge(replica, client.receive, client.send, "id-1")


async def test_events_pass_both_ways_and_the_end_of_the_application_closes_it() -> None:
    client = Client({"type": "websocket.receive", "text": "hello"}, {"type": "websocket.receive", "bytes": b"\0"})
    replica = Replica(ACCEPT, WebSocketEvent("send", text="a"), WebSocketEvent("send", data=b"b"))
    serving = asyncio.create_task(between(client, replica).run())
    await until(lambda: len(replica.heard) == 2 and len(client.got) == 3)
    replica.says.put_nowait(None)
    await serving

    assert [(event.text, event.data) for event in replica.heard] == [("hello", None), (None, b"\0")]
    assert client.types() == ["accept", "send", "send", "close"]
    assert client.got[0]["subprotocol"] == "chat"
    assert (b"x-a", b"b") in client.got[0]["headers"]
    assert client.got[-1]["code"] == 1000


async def test_the_application_closes_with_a_code_of_its_own() -> None:
    client, replica = Client(), Replica(ACCEPT, WebSocketEvent("close", code=4001, reason="no"))
    replica.says.put_nowait(WebSocketEvent("send", text="too late"))
    replica.says.put_nowait(None)
    await between(client, replica).run()

    assert client.types() == ["accept", "close"]
    assert (client.got[1]["code"], client.got[1]["reason"]) == (4001, "no")


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 2999, 5000])
async def test_a_code_that_may_not_be_sent_is_1011(code: int) -> None:
    client, replica = Client(), Replica(ACCEPT, WebSocketEvent("close", code=code, reason="no"), None)
    await between(client, replica).run()
    assert (client.got[-1]["type"], client.got[-1]["code"]) == ("websocket.close", 1011)


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1007, 1008, 1011, 1012, 1014, 3000, 4999])
async def test_a_code_that_may_be_sent_is_sent_as_the_library_does(code: int) -> None:
    client, replica = Client(), Replica(ACCEPT, WebSocketEvent("close", code=code, reason="x" * 122 + "é"), None)
    await between(client, replica).run()
    assert (client.got[-1]["code"], client.got[-1]["reason"]) == (code, "x" * 122)
    assert Close(client.got[-1]["code"], client.got[-1]["reason"]).serialize()


@pytest.mark.parametrize("said", [(WebSocketEvent("close", code=4001),), ()], ids=["it refuses", "it says nothing"])
async def test_what_an_application_does_not_accept_is_denied_with_the_id_of_the_request(
    said: tuple[WebSocketEvent, ...],
) -> None:
    client = Client()
    await between(client, Replica(*said, None)).run()
    assert client.types() == ["http.response.start", "http.response.body"]
    assert (client.got[0]["status"], dict(client.got[0]["headers"])[b"x-request-id"]) == (403, b"id-1")


@pytest.mark.parametrize(
    "said",
    [WebSocketEvent("accept", headers=[(b"x", b"a\r\nb: c")]), WebSocketEvent("accept", subprotocol="a\r\nb: c")],
)
async def test_an_acceptance_that_could_be_taken_for_more_is_a_500(said: WebSocketEvent) -> None:
    client = Client()
    await between(client, Replica(said, WebSocketEvent("send", text="hello"), None)).run()
    assert client.types() == ["http.response.start", "http.response.body"]
    assert client.got[0]["status"] == 500


async def test_a_client_that_leaves_is_told_to_the_application() -> None:
    client, replica = Client({"type": "websocket.disconnect", "code": 1001, "reason": "bye"}), Replica(ACCEPT)
    serving = asyncio.create_task(between(client, replica).run())
    await until(lambda: replica.has_ended)
    replica.says.put_nowait(WebSocketEvent("send", text="for nobody"))
    replica.says.put_nowait(None)
    await serving

    ((kind, code, reason),) = [(event.type, event.code, event.reason) for event in replica.heard]
    assert (kind, code, reason) == ("disconnect", 1001, "bye")
    assert "close" not in client.types()


async def test_an_application_that_reads_nothing_hears_of_it_when_it_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "_LAST_WORD_S", 0.0)
    client, replica = Client({"type": "websocket.disconnect"}), Replica()
    replica.reads = False
    serving = asyncio.create_task(between(client, replica).run())
    await until(lambda: replica.aborted)
    replica.says.put_nowait(None)
    await serving
    assert replica.aborted == "the client left"


async def test_an_application_that_only_sends_hears_of_it_behind_messages_it_has_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(websocket, "_LAST_WORD_S", 0.0)
    client = Client({"type": "websocket.receive", "text": "never read"}, {"type": "websocket.disconnect"})
    replica = Replica(ACCEPT)
    replica.reads = False
    serving = asyncio.create_task(between(client, replica).run())
    await until(lambda: client.types() == ["accept"])
    client.has_left = True
    replica.says.put_nowait(WebSocketEvent("send", text="tick"))

    await until(lambda: replica.aborted)
    replica.says.put_nowait(None)
    await serving
    assert replica.aborted == "the client left"


async def test_a_client_that_cannot_be_written_to_has_left() -> None:
    client, replica = Client(), Replica(ACCEPT, None)
    client.has_left = True
    bridge = between(client, replica)
    await bridge.run()
    assert bridge.closed
    assert client.got == []


async def test_a_replica_that_dies_closes_what_it_had_accepted_with_1011() -> None:
    client, replica = Client(), Replica(ACCEPT, StreamBroken("gone"))
    await between(client, replica).run()
    assert client.types() == ["accept", "close"]
    assert client.got[1]["code"] == 1011


async def test_one_that_dies_before_leaves_the_answer_to_the_gateway() -> None:
    client = Client()
    with pytest.raises(StreamBroken):
        await between(client, Replica(StreamBroken("gone"))).run()
    assert client.got == []


async def test_a_denial_is_sent_once_it_is_whole() -> None:
    denial = WebSocketEvent("deny", code=401, headers=[(b"x-a", b"b")])
    more, last = WebSocketEvent("deny.body", data=b"no", reason="more"), WebSocketEvent("deny.body", data=b"body")
    client, replica = Client(), Replica(denial, more, last, None)
    await between(client, replica).run()

    assert client.types() == ["http.response.start", "http.response.body"]
    assert (client.got[0]["status"], client.got[1]["body"]) == (401, b"nobody")

    client = Client()
    with pytest.raises(StreamBroken):
        await between(client, Replica(denial, more, StreamBroken("gone"))).run()
    assert client.got == []  # so that the gateway can say what happened


async def test_a_denial_that_cannot_be_sent_is_a_500() -> None:
    client = Client()
    await deny(client.send, HttpResponse(200, [(b"bad\r\nname", b"x")], b""), "id-1")
    assert client.got[0]["status"] == 500
