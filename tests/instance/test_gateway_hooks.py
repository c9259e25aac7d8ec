"""Hooks of a gateway, around requests of every kind that come in over HTTP; one of them always raises."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from qserve import serve
from qserve.testing import TestInstance
from tests.support import recording_hooks
from tests.support.gates import Gate, Notes
from tests.support.gateways import Gateway, gateway
from tests.support.processes import own_pid
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S


@pytest.fixture
def hooked(qserve_instance: TestInstance, notes: Notes, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway with hooks, beside the one of the instance."""
    variables = {"QSERVE_HOOKS": recording_hooks.HOOKS, recording_hooks.NOTES: tmp_path / "notes"}
    with gateway(qserve_instance.settings, **variables) as running:
        yield running


@pytest.fixture
def client(hooked: Gateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=hooked.ready["url"], timeout=patience(LIMIT_S)) as client:
        yield client


@pytest.fixture
def app(qserve_instance: TestInstance, gate: Gate) -> None:
    """The deployment at /app, with a route for each kind of response."""
    app = FastAPI()
    _add_streams(app, gate)

    @app.get("/plain")
    async def plain() -> str:
        return "plain"

    @app.get("/fails")
    async def fails() -> None:
        raise ValueError("on purpose")

    @app.post("/upload")
    async def upload(request: Request) -> int:
        return sum([len(part) async for part in request.stream()])

    @app.get("/waits")
    async def waits() -> None:
        await gate.passed()

    @app.websocket("/socket")
    async def socket(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(await socket.receive_text())
        await socket.close()

    @app.websocket("/denied")
    async def denied(socket: WebSocket) -> None:
        await socket.close()

    @serve.deployment(name="app")
    @serve.ingress(app)
    class App:
        pass

    App.deploy()


def _add_streams(app: FastAPI, gate: Gate) -> None:
    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            for _ in range(3):
                yield "part"
                await asyncio.sleep(0.01)

        return StreamingResponse(parts())

    @app.get("/cut")
    async def cut() -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield str(own_pid())
            await gate.passed()
            raise ValueError("in the middle")

        return StreamingResponse(parts())


pytestmark = pytest.mark.usefixtures("app")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/app/plain", 200),
        ("GET", "/app/fails", 500),
        ("GET", "/app/unknown", 404),
        ("GET", "/app/stream", 200),
        ("POST", "/app/upload", 200),
    ],
)
def test_hooks_see_a_request_and_how_it_was_answered(
    client: httpx.Client, notes: Notes, method: str, path: str, status: int
) -> None:
    content = bytes(3_000_000) if method == "POST" else None
    response = client.request(method, path, content=content)

    assert response.status_code == status
    assert notes.wait_for(2) == [f"before app {path}", f"after {path} {status}"]
    if path == "/app/upload":
        assert response.json() == 3_000_000
    if path == "/app/stream":
        assert response.text == "part" * 3


def test_hooks_see_that_a_request_becomes_a_durable_call(client: httpx.Client, notes: Notes) -> None:
    response = client.get("/app/plain", headers={"Prefer": "respond-async"})
    assert response.status_code == 202
    assert notes.wait_for(2) == ["before app /app/plain durable", "after /app/plain 202"]


def test_hooks_see_no_request_that_belongs_to_no_deployment(client: httpx.Client, notes: Notes) -> None:
    assert client.get("/nowhere").status_code == 404
    assert client.get("/-/routes").status_code == 200
    assert client.get("/app/plain").status_code == 200
    assert notes.wait_for(2)[0] == "before app /app/plain"


def test_a_body_that_is_refused_is_an_answered_request(
    qserve_instance: TestInstance, notes: Notes, tmp_path: Path
) -> None:
    variables = {"QSERVE_HOOKS": recording_hooks.HOOKS, recording_hooks.NOTES: tmp_path / "notes"}
    with gateway(qserve_instance.settings, QSERVE_MAX_BODY_BYTES=10, **variables) as strict:
        body = b"b\r\n" + bytes(11) + b"\r\n0\r\n\r\n"
        head = b"POST /app/upload HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert strict.address.ask(head + body).startswith(b"HTTP/1.1 413 ")
    assert notes.wait_for(2) == ["before app /app/upload", "after /app/upload 413"]


def test_a_client_that_leaves_is_an_error(hooked: Gateway, notes: Notes) -> None:
    with hooked.address.connect() as connection:
        connection.sendall(b"GET /app/waits HTTP/1.1\r\nHost: x\r\n\r\n")
        notes.wait_for(1)
    assert notes.wait_for(2) == ["before app /app/waits", "error /app/waits ClientDisconnected"]


def test_a_stream_that_breaks_off_is_an_error(hooked: Gateway, notes: Notes, gate: Gate) -> None:
    with hooked.address.connect(patience(LIMIT_S)) as connection:
        connection.sendall(b"GET /app/cut HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        gate.open()
        assert notes.wait_for(2) == ["before app /app/cut", "error /app/cut ResponseCut"]


def test_hooks_see_websockets(hooked: Gateway, notes: Notes) -> None:
    url = hooked.ready["url"].replace("http://", "ws://")

    async def talk() -> None:
        async with connect(f"{url}/app/socket") as socket:
            await socket.send("echo")
            assert await socket.recv() == "echo"
        with pytest.raises(InvalidStatus):
            async with connect(f"{url}/app/denied"):
                pass

    asyncio.run(talk())
    assert sorted(notes.wait_for(4)) == [
        "after /app/denied 403",
        "after /app/socket 101",
        "before app /app/denied",
        "before app /app/socket",
    ]


def test_a_gateway_that_cannot_load_a_hook_says_so(qserve_instance: TestInstance) -> None:
    with gateway(qserve_instance.settings, QSERVE_HOOKS="tests.support.recording_hooks:Missing") as failed:
        assert "QSERVE_HOOKS names 'tests.support.recording_hooks:Missing'" in failed.ready["error"]
