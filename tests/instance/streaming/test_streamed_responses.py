"""Responses in parts: in order, whole or visibly cut, no faster than they are read, and as soon as they are made."""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from qserve import serve
from qserve.testing import TestInstance
from qserve_gateway.bodies.streaming import OneLinePerCut, ResponseCut
from tests.support.gates import Gate, Notes
from tests.support.processes import PeakMemory, connect, gateway_pid, read_to_end, read_until, valkey_pid
from tests.support.serving import free_port
from tests.support.slowness import patience
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("qserve_instance")

MIB = 1024 * 1024


def test_a_streaming_response_arrives_in_order_and_whole(http: httpx.Client) -> None:
    app = FastAPI()

    @app.get("/")
    async def numbers() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            for number in range(20_000):
                yield f"{number}\n"

        return StreamingResponse(lines(), media_type="text/plain")

    _deploy(app)

    with http.stream("GET", "/served/") as response:
        text = "".join(response.iter_text())

    assert response.headers["transfer-encoding"] == "chunked"
    assert text == "".join(f"{number}\n" for number in range(20_000))


def test_parts_of_any_size_arrive_whole(http: httpx.Client) -> None:
    app = FastAPI()
    sizes = [3 * MIB, 1, 0, 128 * 1024, 128 * 1024 + 1, 5 * MIB, 7]

    @app.get("/")
    async def blocks() -> StreamingResponse:
        return StreamingResponse(bytes([index]) * size for index, size in enumerate(sizes))

    _deploy(app)

    assert http.get("/served/").content == b"".join(bytes([index]) * size for index, size in enumerate(sizes))


@pytest.mark.parametrize("kind", ["def", "async def", "async generator", "generator"])
def test_a_plain_deployment_may_return_a_generator(kind: str, http: httpx.Client) -> None:
    @serve.deployment(name="plain")
    class FromDef:
        def __call__(self, request: Request) -> Iterator[str]:
            return (f"{number}\n" for number in range(100))

    @serve.deployment(name="plain")
    class FromAsyncDef:
        async def __call__(self, request: Request) -> AsyncIterator[str]:
            async def lines() -> AsyncIterator[str]:
                for number in range(100):
                    yield f"{number}\n"

            return lines()

    @serve.deployment(name="plain")
    class AsyncGenerator:
        async def __call__(self, request: Request) -> AsyncIterator[str]:
            for number in range(100):
                yield f"{number}\n"

    @serve.deployment(name="plain")
    class Generator:
        def __call__(self, request: Request) -> Iterator[str]:
            for number in range(100):
                yield f"{number}\n"

    chosen = {"def": FromDef, "async def": FromAsyncDef, "async generator": AsyncGenerator, "generator": Generator}
    chosen[kind].deploy()

    response = http.get("/plain")

    assert response.text == "".join(f"{number}\n" for number in range(100))
    assert response.headers["content-type"].startswith("text/plain")


def test_values_that_are_not_text_are_lines_of_json(http: httpx.Client) -> None:
    @serve.deployment
    def rows(request: Request) -> Iterator[object]:
        yield {"a": 1}
        yield [2]

    rows.deploy()

    assert http.get("/rows").text == '{"a": 1}\n[2]\n'


def test_the_first_event_arrives_while_the_generator_waits(http: httpx.Client, gate: Gate) -> None:
    app = FastAPI()

    @app.get("/")
    async def events() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            yield "data: first\n\n"
            await gate.passed()
            yield "data: second\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    _deploy(app)

    with http.stream("GET", "/served/") as response:
        parts = response.iter_text()
        assert next(parts) == "data: first\n\n"
        gate.open()
        assert "".join(parts) == "data: second\n\n"


CLOCK = """
import asyncio, time
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
app = FastAPI()

@app.get("/")
async def events():
    async def lines():
        for _ in range(20):
            yield f"data: {time.time()}\\n\\n"
            await asyncio.sleep(0.02)
    return StreamingResponse(lines(), media_type="text/event-stream")
"""


def test_an_event_takes_at_most_50_ms_longer_than_under_plain_uvicorn(
    qserve_instance: TestInstance, tmp_path: Path
) -> None:
    (tmp_path / "clock_app.py").write_text(CLOCK)
    port = free_port()
    names: dict[str, object] = {}
    exec(CLOCK, names)
    _deploy(names["app"])
    command = [sys.executable, "-m", "uvicorn", "clock_app:app", "--port", str(port), "--log-level", "error"]
    with subprocess.Popen(command, cwd=tmp_path) as uvicorn:
        try:
            bare = f"http://127.0.0.1:{port}/"
            wait_until(lambda: _answers(bare))
            extra = min(
                _first_event_delay(f"{qserve_instance.url}/served/") - _first_event_delay(bare) for _ in range(5)
            )
        finally:
            uvicorn.kill()
    assert extra <= patience(0.05)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def _first_event_delay(url: str) -> float:
    with httpx.stream("GET", url) as response:
        first = next(response.iter_text())
        arrived = time.time()
        return arrived - float(first.split()[1])


def test_an_error_in_the_middle_cuts_the_connection_visibly(http: httpx.Client) -> None:
    @serve.deployment
    def failing(request: Request) -> Iterator[str]:
        for number in range(10):
            yield f"{number}\n" * 1000
        raise ZeroDivisionError

    app = FastAPI()

    @app.post("/")
    async def once() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            yield "only\n"
            raise ZeroDivisionError

        return StreamingResponse(lines())

    failing.deploy()
    _deploy(app)

    for method, path in (("GET", "/failing"), ("POST", "/served/")):
        with http.stream(method, path) as response:
            assert response.status_code == 200
            with pytest.raises(httpx.RemoteProtocolError):
                response.read()


def test_status_and_headers_leave_before_the_first_part(http: httpx.Client, gate: Gate) -> None:
    app = FastAPI()

    @app.get("/")
    async def later() -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            await gate.passed()
            yield "part"

        return StreamingResponse(parts(), 201, {"x-mine": "yes"})

    _deploy(app)

    with http.stream("GET", "/served/") as response:
        assert (response.status_code, response.headers["x-mine"]) == (201, "yes")
        gate.open()
        assert response.read() == b"part"


def test_a_stream_that_is_idle_after_its_headers_is_not_cut_by_the_deadline(http: httpx.Client) -> None:
    app = FastAPI()
    deadline_s = patience(1)

    @app.get("/")
    async def slow() -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            await asyncio.sleep(deadline_s * 1.5)
            yield "part"

        return StreamingResponse(parts())

    _deploy(app)

    assert http.get("/served/", headers={"x-request-timeout-ms": str(int(deadline_s * 1000))}).text == "part"


def test_an_application_that_takes_every_scope_for_a_request_is_served(http: httpx.Client) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"tick", "more_body": True})
            await asyncio.sleep(0.01)

    _deploy(app)

    with http.stream("GET", "/served/") as response:
        assert response.status_code == 200
        assert next(response.iter_bytes(4)) == b"tick"


def test_to_http_1_0_a_stream_goes_without_chunks_until_the_connection_ends(
    qserve_instance: TestInstance, gate: Gate
) -> None:
    app = FastAPI()

    @app.get("/{ending}")
    async def stream(ending: str) -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "first,"
            await gate.passed()
            if ending == "cut":
                raise ZeroDivisionError
            yield "last"

        return StreamingResponse(parts())

    _deploy(app)

    whole = connect(qserve_instance, b"GET /served/whole HTTP/1.0\r\nhost: HOST\r\n\r\n")
    cut = connect(qserve_instance, b"GET /served/cut HTTP/1.0\r\nhost: HOST\r\n\r\n")
    with whole, cut:
        beginnings = [read_until(each, b"first,") for each in (whole, cut)]
        gate.open()
        with pytest.raises(ConnectionResetError):
            cut.recv(1)
        rest = read_to_end(whole)
    head, _, body = (beginnings[0] + rest).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"chunked" not in head
    assert b"connection: close" in head
    assert body == b"first,last"


def test_an_error_before_the_first_part_is_a_500(http: httpx.Client) -> None:
    @serve.deployment
    def failing(request: Request) -> Iterator[str]:
        raise ZeroDivisionError
        yield ""

    failing.deploy()

    response = http.get("/failing")

    assert response.status_code == 500
    assert "ZeroDivisionError" in response.text


def test_a_declared_length_is_kept_and_a_short_body_is_no_whole_one(http: httpx.Client) -> None:
    app = FastAPI()

    @app.get("/{declared}")
    async def sized(declared: int) -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"x" * 100
                await asyncio.sleep(0.01)

        return StreamingResponse(parts(), headers={"content-length": str(declared)})

    _deploy(app)

    whole = http.get("/served/300")
    assert (whole.headers["content-length"], len(whole.content)) == ("300", 300)
    with pytest.raises(httpx.RemoteProtocolError):
        http.get("/served/301")


def test_a_head_request_gets_no_body_and_keeps_the_connection(http: httpx.Client) -> None:
    app = FastAPI()

    @app.api_route("/", methods=["GET", "HEAD"])
    async def blocks() -> StreamingResponse:
        return StreamingResponse(b"x" * 1000 for _ in range(100))

    _deploy(app)

    assert http.head("/served/").content == b""
    assert len(http.get("/served/").content) == 100_000


def test_a_replica_that_is_killed_cuts_its_streams(http: httpx.Client, notes: Notes) -> None:
    app = FastAPI()

    @app.post("/")
    async def endless() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            notes.add(os.getpid())
            while True:
                yield "more\n"
                await asyncio.sleep(0.01)

        return StreamingResponse(lines())

    _deploy(app)

    with http.stream("POST", "/served/") as response:
        os.kill(int(notes.wait_for(1)[0]), signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):
            response.read()


def test_a_slow_reader_pauses_the_generator_and_memory_stays_flat(qserve_instance: TestInstance, notes: Notes) -> None:
    app = FastAPI()
    total = 256 * MIB

    @app.get("/")
    async def blocks() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            notes.add(os.getpid())
            for _ in range(total // 65536):
                yield b"x" * 65536
                notes.add("")

        return StreamingResponse(parts())

    _deploy(app)
    connection = connect(qserve_instance, b"GET /served/ HTTP/1.1\r\nhost: HOST\r\nconnection: close\r\n\r\n")
    with connection:
        replica = int(notes.wait_for(1)[0])
        pids = (gateway_pid(qserve_instance), replica, valkey_pid(qserve_instance.settings, "served"))
        with PeakMemory(*pids) as memory:
            made = _rest(notes)
            assert made * 65536 < 32 * MIB  # what fits into buffers: the sockets' and a window
            received = 0
            while data := connection.recv(1 << 20):
                received += len(data)
    assert received > total
    assert memory.extra_mib < 64


def _rest(notes: Notes) -> int:
    """How many lines there are once no more come."""
    seen = -1
    while (now := len(notes.read())) > seen:
        seen = now
        time.sleep(0.5)
    return seen


def test_a_client_that_leaves_ends_the_generator_even_one_that_waits(
    qserve_instance: TestInstance, notes: Notes
) -> None:
    app = FastAPI()

    @app.post("/")
    async def endless() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            try:
                yield "first\n"
                await asyncio.sleep(3600)
            finally:
                notes.add("closed")

        return StreamingResponse(lines())

    _deploy(app)

    request = b"POST /served/ HTTP/1.1\r\nhost: HOST\r\ncontent-length: 0\r\n\r\n"
    with connect(qserve_instance, request) as connection:
        read_until(connection, b"first")
    assert notes.wait_for(1) == ["closed"]


def test_a_client_that_leaves_closes_a_sync_generator(qserve_instance: TestInstance, notes: Notes) -> None:
    @serve.deployment
    def endless(request: Request) -> Iterator[str]:
        try:
            while True:
                yield "more\n"
                time.sleep(0.01)
        finally:
            notes.add("closed")

    endless.deploy()

    with connect(qserve_instance, b"GET /endless HTTP/1.1\r\nhost: HOST\r\n\r\n") as connection:
        read_until(connection, b"more")
    assert notes.wait_for(1) == ["closed"]


def test_http_1_0_clients_see_the_end_of_a_stream(qserve_instance: TestInstance) -> None:
    @serve.deployment
    def lines(request: Request) -> Iterator[str]:
        yield "one\n"
        yield "two\n"

    lines.deploy()

    with connect(qserve_instance, b"GET /lines HTTP/1.0\r\nhost: HOST\r\n\r\n") as connection:
        received = read_to_end(connection)
    assert b"one\n" in received
    assert b"two\n" in received


def test_a_cut_response_is_one_line_in_the_gateways_log() -> None:
    try:
        raise ResponseCut("the response to request 7 was cut: why")
    except ResponseCut:
        record = logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, "Exception", None, sys.exc_info())
    assert OneLinePerCut().filter(record)
    assert logging.Formatter("%(levelname)s %(message)s").format(record) == (
        "WARNING the response to request 7 was cut: why"
    )


def test_pauses_of_a_client_do_not_end_a_stream(qserve_instance: TestInstance) -> None:
    @serve.deployment(timeout_s=1)
    async def slow(request: Request) -> AsyncIterator[str]:
        for _ in range(4):
            yield "more\n"
            await asyncio.sleep(0.5)

    slow.deploy()
    with connect(qserve_instance, b"GET /slow HTTP/1.1\r\nhost: HOST\r\nconnection: close\r\n\r\n") as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        received = read_to_end(connection)
    assert received.endswith(b"0\r\n\r\n")
    assert received.count(b"more") == 4


def _deploy(app: object) -> None:
    @serve.deployment(name="served")
    @serve.ingress(app)
    class Served:
        pass

    Served.deploy()
