"""A whole instance whose gateway loses its patience after half a second, so that every input has an answer soon."""

import asyncio
import gzip
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi import FastAPI, WebSocket
from starlette.requests import Request
from starlette.responses import Response

from qserve import serve
from qserve.calls import process_client
from qserve.testing import TestInstance, instance
from tests.support.gates import Gate
from tests.support.raw_http import Address

PATIENCE = {
    "QSERVE_HTTP_HEADER_TIMEOUT_S": "0.8",
    "QSERVE_HTTP_BODY_TIMEOUT_S": "0.5",
    "QSERVE_HTTP_KEEP_ALIVE_S": "1",
    "QSERVE_MAX_BODY_BYTES": "2000000",
    "QSERVE_WEBSOCKET_ORIGINS": "https://friend.example, http://other.example:8080",
}


async def tell(request: Request) -> dict[str, Any]:
    """What has arrived."""
    return {
        "method": request.method,
        "path": request.scope["path"],
        "query": request.scope["query_string"].decode("latin-1"),
        "headers": sorted([name.decode("latin-1"), value.decode("latin-1")] for name, value in request.headers.raw),
        "body": len(await request.body()),
        "version": request.scope["http_version"],
    }


async def fail(request: Request) -> None:
    raise RuntimeError("for the log")


async def slow(request: Request) -> str:
    """Takes a moment, or until the file that its query names is there."""
    if gate := request.query_params.get("gate"):
        await Gate(Path(gate)).passed()
    else:
        await asyncio.sleep(0.3)
    return "done"


async def compressed(request: Request) -> Response:
    """A body that only a client which asked for it can read."""
    coding = request.headers["accept-encoding"]
    return Response(gzip.compress(b"hello"), headers={"content-encoding": coding, "vary": "accept-encoding"})


sockets = FastAPI()


@sockets.websocket("/")
async def greet(socket: WebSocket) -> None:
    """Accepts every WebSocket that comes this far."""
    await socket.accept()
    await socket.close()


@pytest.fixture(scope="session")
def impatient() -> Iterator[TestInstance]:
    """The instance; "/" answers with what has arrived there, "/fail" fails, "/slow" takes a while, "/ws" greets."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        outside = os.environ["QSERVE_RUNTIME_DIR"]
        for name, value in PATIENCE.items():
            patch.setenv(name, value)
        running = stack.enter_context(instance())
        inside = os.environ["QSERVE_RUNTIME_DIR"]
        for name, function in (("tell", tell), ("fail", fail), ("slow", slow), ("zip", compressed)):
            route = "/" if name == "tell" else f"/{name}"
            serve.deployment(name=name, route_prefix=route)(function).deploy()
        serve.deployment(name="ws", route_prefix="/ws")(serve.ingress(sockets)(type("Sockets", (), {}))).deploy()
        process_client.close_current_client()
        for name in PATIENCE:  # an instance that starts later in this session is not to have them
            patch.delenv(name)
        os.environ["QSERVE_RUNTIME_DIR"] = outside
        yield running
        os.environ["QSERVE_RUNTIME_DIR"] = inside


@pytest.fixture(scope="session")
def door(impatient: TestInstance) -> Address:
    """Where its gateway listens."""
    return Address.of(impatient.url)


@pytest.fixture
def unharmed(door: Address) -> Iterator[None]:
    """Afterwards all processes of the gateway and the replicas are the same, and the next good request is answered."""
    before = processes()
    yield
    assert processes() == before
    assert door.ask(b"GET /after HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def processes() -> set[tuple[int, float]]:
    """This test session's instances: gateways, nodes, workers and replicas."""
    return {(found.pid, found.create_time()) for found in psutil.Process().children(recursive=True)}


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate and its key for localhost."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder
