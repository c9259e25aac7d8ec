"""Uploads reach the replica as they come in; what goes wrong on the way is seen on both sides."""

import asyncio
import hashlib
import os
import socket
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI, Form, UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, StreamingResponse

from qserve import serve
from qserve.testing import TestInstance, instance
from tests.support.gates import Notes
from tests.support.processes import PeakMemory, connect, gateway_pid, read_to_end, read_until, valkey_pid
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S

pytestmark = pytest.mark.usefixtures("qserve_instance")

MIB = 1024 * 1024
LARGE = os.urandom(MIB) * 3


def _pieces(body: bytes, size: int = 50_000) -> Iterator[bytes]:
    return (body[start : start + size] for start in range(0, len(body), size))


@pytest.mark.parametrize("size", [0, 1, 256 * 1024, 256 * 1024 + 1, 3 * MIB])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_arrives_whole(size: int, chunked: bool, http: httpx.Client) -> None:
    app = FastAPI()

    @app.post("/")
    async def digest(request: Request) -> dict[str, object]:
        found = hashlib.sha256()
        parts = 0
        async for part in request.stream():
            found.update(part)
            parts += 1
        return {"sha256": found.hexdigest(), "parts": parts}

    _deploy(app)
    body = LARGE[:size]

    answer = http.post("/served/", content=_pieces(body) if chunked else body).json()

    assert answer["sha256"] == hashlib.sha256(body).hexdigest()
    assert size < MIB or not chunked or answer["parts"] > 3


def test_the_handler_reads_while_the_client_still_sends(qserve_instance: TestInstance, notes: Notes) -> None:
    app = FastAPI()

    @app.post("/")
    async def count(request: Request) -> int:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size >= MIB:
                notes.add("half")
        return size

    _deploy(app)
    head = b"POST /served/ HTTP/1.1\r\nhost: HOST\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % (2 * MIB)

    with connect(qserve_instance, head) as connection:
        connection.sendall(LARGE[:MIB])
        notes.wait_for(1)
        connection.sendall(LARGE[:MIB])
        assert read_to_end(connection).endswith(b"%d" % (2 * MIB))


def test_small_chunks_reach_the_handler_before_the_client_goes_on(qserve_instance: TestInstance, notes: Notes) -> None:
    app = FastAPI()

    @app.post("/")
    async def listen(request: Request) -> str:
        heard = b""
        async for part in request.stream():
            heard += part
            notes.add(heard.decode())
        return heard.decode()

    _deploy(app)
    head = b"POST /served/ HTTP/1.1\r\nhost: HOST\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"

    with connect(qserve_instance, head) as connection:
        for count, word in enumerate((b"one", b"two", b"six"), 1):
            connection.sendall(b"3\r\n%b\r\n" % word)
            assert len(notes.wait_for(count)[-1]) == 3 * count
        connection.sendall(b"0\r\n\r\n")
        assert read_to_end(connection).endswith(b'"onetwosix"')


def test_sync_code_and_body_and_json_get_all_of_it(http: httpx.Client) -> None:
    @serve.deployment
    class Sync:
        def __call__(self, request: Request) -> str:
            return request.method

    @serve.deployment
    async def whole(request: Request) -> int:
        return len(await request.body())

    Sync.deploy()
    whole.deploy()

    assert http.post("/Sync", content=LARGE).text == "POST"
    assert http.post("/whole", content=LARGE).json() == len(LARGE)


def test_forms_with_large_files(http: httpx.Client) -> None:
    app = FastAPI()

    @app.post("/")
    async def take(file: UploadFile, note: str = Form()) -> dict[str, object]:
        content = await file.read()
        return {"name": file.filename, "sha256": hashlib.sha256(content).hexdigest(), "note": note}

    @app.post("/sync")
    def take_in_a_thread(file: UploadFile) -> int:
        return len(file.file.read())

    _deploy(app)

    answer = http.post("/served/", files={"file": ("large.bin", LARGE)}, data={"note": "hm"}).json()
    assert answer == {"name": "large.bin", "sha256": hashlib.sha256(LARGE).hexdigest(), "note": "hm"}
    assert http.post("/served/sync", files={"file": ("large.bin", LARGE)}).json() == len(LARGE)


def test_the_response_to_an_upload_may_be_streamed(http: httpx.Client) -> None:
    app = FastAPI()

    @app.post("/")
    async def after(request: Request) -> StreamingResponse:
        size = len(await request.body())
        return StreamingResponse(str(size).encode() for _ in range(3))

    _deploy(app)

    assert http.post("/served/", content=LARGE).content == str(len(LARGE)).encode() * 3


def test_an_early_response_ends_the_upload(qserve_instance: TestInstance) -> None:
    app = FastAPI()

    @app.post("/")
    async def refuse() -> PlainTextResponse:
        return PlainTextResponse("not today", 403)

    _deploy(app)
    head = b"POST /served/ HTTP/1.1\r\nhost: HOST\r\ncontent-length: %d\r\n\r\n" % (64 * MIB)

    with connect(qserve_instance, head) as connection:
        connection.sendall(LARGE[: MIB // 2])
        assert b"not today" in read_until(connection, b"not today")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSERVE_MAX_BODY_BYTES", str(MIB))
    with instance() as limited, httpx.Client(base_url=limited.url, timeout=patience(LIMIT_S)) as http:

        @serve.deployment
        async def whole(request: Request) -> int:
            return len(await request.body())

        whole.deploy()

        over = LARGE[: MIB + 1]
        response = http.post("/whole", content=_pieces(over) if chunked else over)
        assert response.status_code == 413
        assert "QSERVE_MAX_BODY_BYTES" in response.text
        assert http.post("/whole", content=LARGE[:MIB]).json() == MIB


def test_a_client_that_stops_half_way_is_seen_by_the_handler(qserve_instance: TestInstance, notes: Notes) -> None:
    app = FastAPI()

    @app.post("/")
    async def count(request: Request) -> None:
        notes.add("started")
        try:
            async for _ in request.stream():
                pass
        except ClientDisconnect:
            notes.add("disconnected")
            raise

    @app.post("/raw")
    async def raw(request: Request) -> None:
        notes.add("started")
        while (message := await request.receive())["type"] == "http.request":
            if not message.get("more_body"):
                notes.add("whole")
        notes.add(message["type"])

    _deploy(app)

    for path, last in ((b"/served/", "disconnected"), (b"/served/raw", "http.disconnect")):
        before = len(notes.read())
        head = b"POST %b HTTP/1.1\r\nhost: HOST\r\ncontent-length: %d\r\n\r\n" % (path, 2 * MIB)
        with connect(qserve_instance, head) as connection:
            connection.sendall(LARGE[:MIB])
            notes.wait_for(before + 1)
        assert notes.wait_for(before + 2)[before:] == ["started", last]


def test_a_slow_handler_slows_the_client_and_memory_stays_flat(qserve_instance: TestInstance, notes: Notes) -> None:
    app = FastAPI()
    total = 256 * MIB

    @app.post("/")
    async def count(request: Request) -> int:
        notes.add(os.getpid())
        return sum([len(part) async for part in request.stream()])

    _deploy(app)
    head = b"POST /served/ HTTP/1.1\r\nhost: HOST\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % total
    block = bytes(4 * MIB)

    with connect(qserve_instance, head) as connection:
        connection.sendall(block)
        replica = int(notes.wait_for(1)[0])
        pids = (gateway_pid(qserve_instance), replica, valkey_pid(qserve_instance.settings, "served"))
        with PeakMemory(*pids) as memory:
            for _ in range(total // len(block) - 1):
                connection.sendall(block)
            assert read_to_end(connection).endswith(b"%d" % total)
    assert memory.extra_mib < 64


def test_a_handler_that_does_not_read_stops_the_client(qserve_instance: TestInstance, notes: Notes) -> None:
    app = FastAPI()

    @app.post("/")
    async def first_part(request: Request) -> int:
        size = 0
        async for part in request.stream():
            size += len(part)
            if not notes.read():
                notes.add("waiting")
                while len(notes.read()) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        return size

    _deploy(app)
    total = 80 * MIB
    head = b"POST /served/ HTTP/1.1\r\nhost: HOST\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % total

    with connect(qserve_instance, head) as connection:
        notes_before_stall = _send_until_it_stalls(connection, total)
        assert notes_before_stall < 32 * MIB
        notes.add("go on")
        connection.settimeout(patience(LIMIT_S))
        connection.sendall(bytes(total - notes_before_stall))
        assert read_to_end(connection).endswith(b"%d" % total)


def _send_until_it_stalls(connection: socket.socket, total: int) -> int:
    connection.settimeout(1)
    sent = 0
    try:
        while sent < total:
            sent += connection.send(bytes(65536))
    except TimeoutError:
        return sent
    raise AssertionError("nothing stopped the client")


def test_is_disconnected_is_false_while_the_client_waits_and_true_afterwards(
    qserve_instance: TestInstance, notes: Notes
) -> None:
    app = FastAPI()

    @app.post("/")
    async def wait(request: Request) -> None:
        size = len(await request.body())
        notes.add(await request.is_disconnected())
        while not await request.is_disconnected():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        notes.add(size)

    _deploy(app)

    for count, size in enumerate((10, MIB)):
        head = b"POST /served/ HTTP/1.1\r\nhost: HOST\r\ncontent-length: %d\r\n\r\n" % size
        with connect(qserve_instance, head) as connection:
            connection.sendall(bytes(size))
            notes.wait_for(2 * count + 1)
        assert notes.wait_for(2 * count + 2)[2 * count :] == ["False", str(size)]


def _deploy(app: object) -> None:
    @serve.deployment(name="served", max_concurrent_queries=10)
    @serve.ingress(app)
    class Served:
        pass

    Served.deploy()
