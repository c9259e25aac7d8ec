"""Bodies that gateway and replica share in memory: whole, however the connection is used, and given back."""

import contextlib
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import Response
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request

from qserve import serve
from qserve.testing import TestInstance
from tests.support.gates import Gate, Notes
from tests.support.gateways import gateway
from tests.support.processes import connect
from tests.support.raw_http import read_response
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, wait_until

pytestmark = pytest.mark.usefixtures("qserve_instance")

MIB = 1024 * 1024
LARGE = os.urandom(3 * MIB + 5)


@pytest.fixture(autouse=True)
def _served(qserve_instance: TestInstance, gate: Gate, notes: Notes) -> None:
    app = FastAPI()

    @app.post("/")
    async def digest(request: Request) -> str:
        return hashlib.sha256(await request.body()).hexdigest()

    @app.post("/begun")
    async def begun(request: Request) -> None:
        notes.add("begun")
        with contextlib.suppress(ClientDisconnect):
            await request.body()

    @app.get("/made/{number}/{size}")
    async def made(number: int, size: int) -> Response:
        body = bytes([number]) * size
        return Response(body, headers={"pid": str(os.getpid())})

    @app.get("/background")
    async def background() -> Response:
        return Response(LARGE * 2, headers={"pid": str(os.getpid())}, background=BackgroundTask(gate.pass_through))

    @serve.deployment(name="served", max_concurrent_queries=10)
    @serve.ingress(app)
    class Served:
        pass

    Served.deploy()


def segments_of(pid: str) -> int:
    """How many memory files a process has."""
    links = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.append(os.readlink(descriptor))  # noqa: PTH115
    return sum("memfd:qserve" in link for link in links)


def test_what_follows_a_large_body_on_its_connection_is_the_next_request(qserve_instance: TestInstance) -> None:
    head = b"POST /served/ HTTP/1.1\r\nhost: HOST\r\ncontent-length: %d\r\n\r\n"
    bodies = [LARGE, LARGE[: 300 * 1024], b"x" * (70 * 1024), b"small", LARGE[::-1]]
    requests = b"".join(head % len(body) + body for body in bodies)

    with connect(qserve_instance, b"") as connection, ThreadPoolExecutor(1) as threads:
        sending = threads.submit(connection.sendall, requests)
        answers = [read_response(connection) for _ in bodies]
        sending.result()

    expected = [b'"%b"' % hashlib.sha256(body).hexdigest().encode() for body in bodies]
    assert [(status, body) for status, _, body in answers] == [(200, each) for each in expected]


def test_a_large_body_may_pause_and_its_connection_goes_on(qserve_instance: TestInstance) -> None:
    head = b"POST /served/ HTTP/1.1\r\nhost: HOST\r\ncontent-length: %d\r\n\r\n" % len(LARGE)

    with connect(qserve_instance, head + LARGE[:MIB]) as connection:
        connection.settimeout(0.2)  # longer than the gateway waits for more before it sends on what it has
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(patience(LIMIT_S))
        connection.sendall(LARGE[MIB:] + head + LARGE)
        answers = [read_response(connection)[2] for _ in range(2)]

    assert answers == [b'"%b"' % hashlib.sha256(LARGE).hexdigest().encode()] * 2


@pytest.mark.parametrize("size", [8 * MIB, 8 * MIB + 7])
def test_a_response_that_is_read_slowly_stays_what_it_was(
    qserve_instance: TestInstance, http: httpx.Client, size: int
) -> None:
    """The memory it is written from is not used for others before its last byte has left the gateway."""
    get = b"GET /served/made/%d/%d HTTP/1.1\r\nhost: HOST\r\n\r\n"
    slow = [connect(qserve_instance, get % (number, size)) for number in range(1, 5)]
    first = [connection.recv(1) for connection in slow]

    for number in range(10, 30):
        assert http.get(f"/served/made/{number}/{size}").content == bytes([number]) * size

    for number, (begun, connection) in enumerate(zip(first, slow, strict=True), 1):
        with connection:
            assert begun == b"H"
            assert read_response(connection)[2] == bytes([number]) * size


@pytest.mark.parametrize("path", [f"/served/made/7/{6 * MIB}", "/served/background"])
def test_the_memory_of_responses_is_used_again(path: str, http: httpx.Client, gate: Gate) -> None:
    gate.open()
    pid = ""
    for _ in range(20):
        pid = http.get(path).headers["pid"]
    wait_until(lambda: segments_of(pid) <= 4, LIMIT_S)


def test_the_memory_of_an_upload_that_breaks_off_is_given_back(qserve_instance: TestInstance, notes: Notes) -> None:
    """Half of it was read into memory that the replica has already been lent."""
    head = b"POST /served/begun HTTP/1.1\r\nhost: HOST\r\ncontent-length: %d\r\n\r\n" % len(LARGE)
    with gateway(qserve_instance.settings) as it:
        for number in range(1, 4):
            with it.address.connect() as connection:
                connection.sendall(head + LARGE[: 2 * MIB])
                notes.wait_for(number)
                assert segments_of(str(it.process.pid)) > 0
        wait_until(lambda: segments_of(str(it.process.pid)) == 0, LIMIT_S)
