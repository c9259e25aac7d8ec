"""Deadlines and clients that leave: what still runs then, and what is left behind."""

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from itertools import chain
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from starlette.requests import Request

import qserve
from qserve import serve
from qserve.calls.client import Client
from qserve.errors import CallCancelled, GetTimeoutError
from qserve.testing import TestInstance, instance
from qserve.wire.spec import DeploymentSpec, Target
from qserve_gateway.gateway import Gateway
from tests.support.chosen_server import client_of
from tests.support.gates import Gate, Notes
from tests.support.processes import connect, gateway_pid, read_until
from tests.support.slowness import patience
from tests.support.waiting import until, wait_until

pytestmark = pytest.mark.usefixtures("qserve_instance")

GET = b"GET /served/%b HTTP/1.1\r\nhost: HOST\r\n\r\n"
POST = b"POST /served/%b HTTP/1.1\r\nhost: HOST\r\ncontent-length: 0\r\n\r\n"


def _deploy(app: object, *, slots: int = 100) -> None:
    @serve.deployment(name="served", max_concurrent_queries=slots)
    @serve.ingress(app)
    class Served:
        pass

    Served.deploy()


def _waiting(gate: Gate, notes: Notes) -> FastAPI:
    """Routes that wait for the gate, and note how that ended."""
    app = FastAPI()

    @app.api_route("/wait", methods=["GET", "POST"])
    async def wait() -> None:
        notes.add("started")
        try:
            await gate.passed()
        except asyncio.CancelledError:
            notes.add("cancelled")
            raise
        notes.add("ended")

    @app.get("/ping")
    async def ping() -> str:
        return "pong"

    return app


# Deadlines


def test_a_request_may_set_its_deadline(http: httpx.Client, gate: Gate, notes: Notes) -> None:
    _deploy(_waiting(gate, notes))

    began = time.monotonic()
    response = http.get("/served/wait", headers={"X-Request-Timeout-Ms": "400"})

    assert response.status_code == 504
    assert 0.35 < time.monotonic() - began < patience(5)
    assert notes.wait_for(2) == ["started", "cancelled"]
    assert http.post("/served/wait", headers={"X-Request-Timeout-Ms": "400"}).status_code == 504
    assert notes.wait_for(3)[2:] == ["started"]  # not safe to leave half done


@pytest.mark.parametrize("asked", ["soon", "-1", "0", "1.5", "9999999999"])
def test_a_deadline_that_is_no_number_is_refused(asked: str, http: httpx.Client, gate: Gate, notes: Notes) -> None:
    _deploy(_waiting(gate, notes))

    response = http.get("/served/ping", headers={"X-Request-Timeout-Ms": asked})

    assert response.status_code == 400
    assert "X-Request-Timeout-Ms" in response.text


def test_a_deployment_may_set_the_deadline_which_a_request_cannot_put_off(http: httpx.Client, gate: Gate) -> None:
    @serve.deployment(timeout_s=0.4)
    async def wait(request: Request) -> None:
        await gate.passed()

    wait.deploy()

    for headers in ({}, {"X-Request-Timeout-Ms": "60000"}):
        began = time.monotonic()
        assert http.get("/wait", headers=headers).status_code == 504
        assert time.monotonic() - began < patience(5)


def test_a_replica_that_blocks_its_loop_does_not_delay_the_504(http: httpx.Client, gate: Gate) -> None:
    app = FastAPI()

    @app.get("/block")
    async def block() -> None:
        gate.pass_through()

    _deploy(app)

    began = time.monotonic()
    assert http.get("/served/block", headers={"X-Request-Timeout-Ms": "300"}).status_code == 504
    assert time.monotonic() - began < patience(5)


def test_an_upload_that_takes_too_long_ends_at_the_deadline_its_client_set(qserve_instance: TestInstance) -> None:
    app = FastAPI()

    @app.post("/")
    async def count(request: Request) -> int:
        return len(await request.body())

    _deploy(app)
    head = (
        b"POST /served/ HTTP/1.1\r\nhost: HOST\r\ncontent-length: 10000000\r\nx-request-timeout-ms: 700\r\n"
        b"connection: close\r\n\r\n"
    )
    with connect(qserve_instance, head) as connection:
        connection.sendall(bytes(400_000))
        assert b" 504 " in read_until(connection, b"\r\n\r\n")


# Clients that leave


def test_a_queued_call_of_a_client_that_left_never_reaches_a_replica(
    qserve_instance: TestInstance, http: httpx.Client, gate: Gate, notes: Notes
) -> None:
    app = _waiting(gate, notes)

    @app.post("/queued")
    async def queued() -> None:
        notes.add("never")

    _deploy(app, slots=1)
    with connect(qserve_instance, POST % b"wait"):
        notes.wait_for(1)
        for _ in range(5):
            with connect(qserve_instance, POST % b"queued"):
                _until_queued(qserve_instance, 2)
            _until_queued(qserve_instance, 1)
        gate.open()
        assert http.get("/served/ping").status_code == 200
    assert notes.read() == ["started", "ended"]


def _until_queued(at: TestInstance, count: int) -> None:
    with client_of(at.settings.redis_url) as client:
        wait_until(lambda: client.xlen(at.settings.keys.calls("served")) == count)


def test_a_running_safe_call_is_cancelled_and_its_slot_is_free(
    qserve_instance: TestInstance, http: httpx.Client, gate: Gate, notes: Notes
) -> None:
    _deploy(_waiting(gate, notes), slots=1)

    for turn in range(3):
        with connect(qserve_instance, GET % b"wait"):
            notes.wait_for(2 * turn + 1)
        assert notes.wait_for(2 * turn + 2)[-1] == "cancelled"
    assert http.get("/served/ping").status_code == 200


def test_an_unsafe_call_is_not_cancelled_but_hears_of_it(
    qserve_instance: TestInstance, gate: Gate, notes: Notes
) -> None:
    app = _waiting(gate, notes)

    @app.post("/listen")
    async def listen(request: Request) -> None:
        notes.add("started")
        await request.body()
        while not await request.is_disconnected():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        notes.add("gone")

    @app.post("/late")
    async def late(request: Request) -> None:
        notes.add("started")
        await gate.passed()
        await request.body()
        notes.add(await request.is_disconnected())

    _deploy(app)

    with connect(qserve_instance, POST % b"listen"):
        notes.wait_for(1)
    assert notes.wait_for(2) == ["started", "gone"]
    with connect(qserve_instance, POST % b"late"):
        notes.wait_for(3)
    with connect(qserve_instance, POST % b"listen"):
        notes.wait_for(4)
    assert notes.wait_for(5)[4] == "gone"  # a replica hears in their order of those who leave
    gate.open()
    assert notes.wait_for(6)[5] == "True"  # it asked for the first time after the client had left


def test_nested_calls_inherit_the_time_that_is_left(http: httpx.Client, notes: Notes) -> None:
    @serve.deployment(route_prefix=None, max_concurrent_queries=10)
    class Inner:
        async def left(self) -> float:
            await asyncio.sleep(3600)
            return 0.0

    @serve.deployment(max_concurrent_queries=10)
    class Outer:
        def __init__(self) -> None:
            self.inner = Inner.get_handle(sync=False)

        async def __call__(self, request: Request) -> None:
            began = time.monotonic()
            try:
                await (await self.inner.left.remote())
            except GetTimeoutError:
                notes.add(time.monotonic() - began)
                raise

    Inner.deploy()
    Outer.deploy()

    assert http.post("/Outer", headers={"X-Request-Timeout-Ms": "800"}).status_code == 504
    assert float(notes.wait_for(1)[0]) < patience(5)


@pytest.mark.parametrize("outer_is_sync", [True, False])
def test_nested_calls_are_cancelled_with_the_call_that_made_them(
    outer_is_sync: bool, qserve_instance: TestInstance, notes: Notes
) -> None:
    @serve.deployment(route_prefix=None, max_concurrent_queries=10)
    class Inner:
        async def wait(self) -> None:
            notes.add("inner started")
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                notes.add("inner cancelled")
                raise

    @serve.deployment(name="served", max_concurrent_queries=10)
    class Async:
        def __init__(self) -> None:
            self.inner = Inner.get_handle(sync=False)

        async def __call__(self, request: Request) -> None:
            await (await self.inner.wait.remote())

    @serve.deployment(name="served")
    class Sync:
        def __init__(self) -> None:
            self.inner = Inner.get_handle()

        def __call__(self, request: Request) -> None:
            try:
                self.inner.wait.remote().result()
            except CallCancelled:
                notes.add("outer told")

    Inner.deploy()
    (Sync if outer_is_sync else Async).deploy()

    with connect(qserve_instance, GET % b""):
        notes.wait_for(1)
    told = ["outer told"] if outer_is_sync else []
    assert sorted(notes.wait_for(2 + len(told))) == ["inner cancelled", "inner started", *told]


def test_calls_that_were_made_and_not_waited_for_go_on(http: httpx.Client, gate: Gate, notes: Notes) -> None:
    @serve.deployment(route_prefix=None, max_concurrent_queries=10)
    class Inner:
        async def work(self) -> None:
            await gate.passed()
            notes.add("done")

    @serve.deployment
    class Outer:
        def __init__(self) -> None:
            self.inner = Inner.get_handle(sync=False)

        async def __call__(self, request: Request) -> str:
            await self.inner.work.remote()
            return "started"

    Inner.deploy()
    Outer.deploy()

    assert http.get("/Outer").text == "started"
    gate.open()
    assert notes.wait_for(1) == ["done"]


def test_a_handle_used_in_a_stream_has_its_own_time(http: httpx.Client) -> None:
    @serve.deployment(route_prefix=None)
    class Inner:
        async def answer(self) -> int:
            return 1

    @serve.deployment(timeout_s=0.5)
    class Outer:
        def __init__(self) -> None:
            self.inner = Inner.get_handle(sync=False)

        async def __call__(self, request: Request) -> AsyncIterator[str]:
            for _ in range(3):
                yield str(await (await self.inner.answer.remote()))
                await asyncio.sleep(0.4)

    Inner.deploy()
    Outer.deploy()

    assert http.get("/Outer").text == "111"


# What is left behind


def _app_of_all_kinds() -> FastAPI:
    app = FastAPI()
    running = set[object]()

    async def linger() -> None:
        me = object()
        running.add(me)
        try:
            await asyncio.sleep(random.random() * 0.05)
        finally:
            running.discard(me)

    @app.get("/quick")
    async def quick() -> None:
        await linger()

    @app.get("/forever")
    async def forever() -> None:
        running.add(asyncio.current_task())
        try:
            await asyncio.sleep(3600)
        finally:
            running.discard(asyncio.current_task())

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            while True:
                await linger()
                yield bytes(10_000)

        return StreamingResponse(parts())

    @app.post("/upload")
    async def upload(request: Request) -> int:
        await linger()
        return len(await request.body())

    @app.get("/running")
    async def count() -> int:
        return len(running)

    return app


REQUESTS = (
    GET % b"quick",
    GET % b"forever",
    GET % b"stream",
    b"POST /served/upload HTTP/1.1\r\nhost: HOST\r\ncontent-length: 2000000\r\n\r\n" + bytes(1_000_000),
    b"POST /served/upload HTTP/1.1\r\nhost: HOST\r\ncontent-length: 262144\r\n\r\n" + bytes(262_144),
)


@pytest.mark.timeout(180)
async def test_a_thousand_disconnects_leave_nothing_behind(qserve_instance: TestInstance, http: httpx.Client) -> None:
    await asyncio.to_thread(_deploy, _app_of_all_kinds())
    settings = qserve_instance.settings
    await asyncio.to_thread(http.get, "/served/quick")
    base = _lasting_keys(qserve_instance)
    host, port = qserve_instance.url.removeprefix("http://").split(":")
    limit = asyncio.Semaphore(50)

    async def come_and_go(number: int) -> None:
        async with limit:
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(REQUESTS[number % len(REQUESTS)].replace(b"HOST", host.encode()))
            await asyncio.sleep(random.random() * 0.06)
            writer.transport.abort()

    await asyncio.gather(*(come_and_go(number) for number in range(1000)))

    with client_of(settings.redis_url) as client:
        await asyncio.to_thread(wait_until, lambda: client.xlen(settings.keys.calls("served")) == 0)
    await asyncio.to_thread(wait_until, lambda: http.get("/served/running").json() == 0)
    await asyncio.to_thread(wait_until, lambda: _lasting_keys(qserve_instance) <= base)


def _lasting_keys(at: TestInstance) -> set[bytes]:
    """All keys but inboxes, which come with the first message and go when none has come for a minute."""
    with client_of(at.settings.redis_url) as client:
        found = chain.from_iterable(client.scan_iter(f"{keys.base}*", count=1000) for keys in at.settings.keys.all())
        return {key for key in found if b":inbox:" not in key and b":alive:" not in key}


async def test_a_gateway_keeps_no_future_of_a_client_that_left(qserve_instance: TestInstance) -> None:
    await asyncio.to_thread(_deploy, _app_of_all_kinds())
    client = Client(qserve_instance.settings)
    await client.start()
    try:
        gateway = Gateway(client, qserve_instance.settings)
        spec = DeploymentSpec(name="served", target=Target("-"), revision="-", route_prefix="/served")
        gateway.use_deployments([spec])
        paths = ("/served/quick", "/served/forever", "/served/stream")
        await asyncio.gather(*(_request_and_leave(gateway, paths[number % 3]) for number in range(300)))
        await until(lambda: not client.pending)
    finally:
        await client.stop()


async def _request_and_leave(gateway: Gateway, path: str) -> None:
    left = asyncio.Event()
    asyncio.get_running_loop().call_later(random.random() * 0.2, left.set)

    async def receive() -> dict[str, object]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        await asyncio.sleep(0)

    scope: dict[str, object] = {"type": "http", "http_version": "1.1", "method": "GET", "path": path}
    scope |= {"raw_path": path.encode(), "query_string": b"", "headers": [(b"host", b"test")], "scheme": "http"}
    scope |= {"client": None, "server": None, "state": {}}
    await gateway(scope, receive, send)


@pytest.mark.timeout(120)
def test_a_gateway_that_is_killed_leaves_no_generator_running(notes: Notes, tmp_path: Path) -> None:
    @serve.deployment(name="served", max_concurrent_queries=10)
    async def stream(request: Request) -> AsyncIterator[bytes]:
        kind = request.url.path
        try:
            yield b"first"
            if kind == "/served/waiting":
                await asyncio.sleep(3600)
            while True:  # until nobody reads any more
                yield bytes(100_000)
        finally:
            notes.add(kind)

    with instance() as running:
        stream.deploy()
        with connect(running, GET % b"waiting") as waiting, connect(running, GET % b"blocked") as blocked:
            read_until(waiting, b"first")
            read_until(blocked, b"first")
            os.kill(gateway_pid(running), signal.SIGKILL)
            wait_until(lambda: sorted(notes.read()) == ["/served/blocked", "/served/waiting"], limit_s=60)
        _until_queued(running, 0)


async def test_cancelling_a_ref_in_the_moment_it_is_put(qserve_instance: TestInstance, notes: Notes) -> None:
    @serve.deployment(route_prefix=None, max_concurrent_queries=100, idempotent=True)
    class Worker:
        async def work(self) -> None:
            notes.add("started")
            try:
                await asyncio.sleep(3600)
            finally:
                notes.add("over")

    await asyncio.to_thread(Worker.deploy)
    handle = Worker.get_handle()
    for turn in range(200):
        ref = handle.work.remote()
        await asyncio.sleep(random.random() * 0.004 * (turn % 3))
        ref.cancel()
        with pytest.raises(CallCancelled):
            qserve.get(ref)
    with client_of(qserve_instance.settings.redis_url) as client:
        stream = qserve_instance.settings.keys.calls("Worker")
        await asyncio.to_thread(wait_until, lambda: client.xlen(stream) == 0)
    seen = notes.read()
    assert seen.count("started") == seen.count("over")
