"""WebSockets at the door, without a network: what is left of them when they end."""

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send
from uvicorn.server import ServerState

from qserve.background import end
from qserve.settings import Settings
from qserve_gateway.door import websocket_protocol
from qserve_gateway.door.access_log import AccessLog
from qserve_gateway.door.limits import Door
from qserve_gateway.door.protocol import HttpProtocol
from qserve_gateway.door.websocket_protocol import WebSocketProtocol
from tests.pure.test_direct import Socket
from tests.support.waiting import until

HANDSHAKE = (
    b"GET /a?b=1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
WITHOUT_KEY = HANDSHAKE.replace(b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", b"")
LONG_LINE = HANDSHAKE.replace(b"Host: x", b"Host: x\r\nCookie: " + b"a" * 9000)


ACCEPT = {"type": "websocket.accept"}


class UnreadSocket(Socket):
    """What its client does not read keeps it open when it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted = asyncio.Event()

    def get_write_buffer_size(self) -> int:
        return 5

    def abort(self) -> None:
        self.closed.set()
        self.aborted.set()


class Connection:
    """One that begins with a handshake, and the application behind it, which does what it is told."""

    def __init__(self, log: Path, descriptor: int) -> None:
        self.log = log
        self.door = Door(Settings(http_send_timeout_s=0.01), has_log=False)
        self.door.log = AccessLog("json", descriptor)
        self.tells: asyncio.Queue[Message | None] = asyncio.Queue()
        config = uvicorn.Config(
            cast(Any, self._answer),
            ws=cast(Any, partial(WebSocketProtocol, self.door)),
            lifespan="off",
            log_config=None,
            interface="asgi3",
            proxy_headers=False,
        )
        config.load()
        self.state = ServerState()
        self.protocol = HttpProtocol(self.door, config=config, server_state=self.state, app_state={})
        self.socket = UnreadSocket()
        self.socket.set_protocol(self.protocol)
        self.protocol.connection_made(self.socket)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await self.tells.get()) is not None:
            await send(message)

    def begin(self, handshake: bytes = HANDSHAKE) -> None:
        self.protocol.data_received(handshake)

    async def tell(self, *messages: Message | None) -> None:
        """Have the application send these; it ends with None."""
        for message in messages:
            self.tells.put_nowait(message)
        await until(self.tells.empty)
        await asyncio.sleep(0)

    def lose(self) -> None:
        self.socket.get_protocol().connection_lost(None)

    async def logged(self) -> list[tuple[str, int]]:
        """The paths and statuses in the access log."""
        await self.door.close()
        lines = map(json.loads, self.log.read_text().splitlines())
        return [(line["path"], line["status"]) for line in lines]


@pytest.fixture
async def connection(tmp_path: Path) -> AsyncIterator[Connection]:
    with (tmp_path / "log").open("wb") as log:
        made = Connection(tmp_path / "log", log.fileno())
        yield made
        await end(*made.state.tasks)
        await made.door.close()


@pytest.mark.parametrize(("handshake", "status"), [(WITHOUT_KEY, 400), (LONG_LINE, 431)])
async def test_nothing_is_left_of_a_malformed_handshake(connection: Connection, handshake: bytes, status: int) -> None:
    connection.begin(handshake)
    await asyncio.sleep(0)
    assert connection.socket.written.startswith(b"HTTP/1.1 %d " % status)
    assert connection.socket.is_closing()
    connection.lose()
    assert connection.state.connections == set(), "a gateway that leaves would wait for it"
    assert connection.door.connections == 0
    assert await connection.logged() == [("-", status)]


async def test_a_client_that_does_not_read_is_cut_off(connection: Connection) -> None:
    connection.door.open()
    connection.begin()
    await connection.tell(ACCEPT)
    await connection.socket.aborted.wait()
    assert connection.door.refused["unread"] == 1
    assert connection.door.connections == connection.door.websockets == 1
    connection.lose()
    assert connection.door.connections == connection.door.websockets == 0


@pytest.mark.parametrize("closing", [True, False])
async def test_a_gateway_that_leaves_waits_for_none_that_does_not_read(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, closing: bool
) -> None:
    monkeypatch.setattr(websocket_protocol, "LINGER_S", 0.01)
    connection.begin()
    await connection.tell(ACCEPT)
    if closing:
        connection.socket.close()
    for each in connection.state.connections:
        each.shutdown()
    await connection.socket.aborted.wait()


@pytest.mark.parametrize(
    ("messages", "status"),
    [
        ([ACCEPT, {"type": "websocket.close"}], 101),
        ([{"type": "websocket.close"}], 403),
        (
            [
                {"type": "websocket.http.response.start", "status": 418, "headers": []},
                {"type": "websocket.http.response.body", "body": b"no"},
            ],
            418,
        ),
        ([None], 500),
        ([], 499),
    ],
)
async def test_how_a_handshake_was_answered_is_noted(
    connection: Connection, messages: list[Message | None], status: int
) -> None:
    connection.begin()
    await connection.tell(*messages)
    connection.lose()
    counted = {key: series.count for key, series in connection.door.counts.series.items()}
    assert counted == ({("", status // 100): 1} if status != 101 else {})
    assert await connection.logged() == [("/a?b=1", status)]
