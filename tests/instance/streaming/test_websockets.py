"""WebSockets through the queue, with the `websockets` library as the peer."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.websockets import WebSocketState
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Close

from qserve import serve
from qserve.testing import TestInstance, instance
from tests.support.gates import Gate, Notes
from tests.support.processes import gateway_pid
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S

pytestmark = pytest.mark.usefixtures("qserve_instance")

MIB = 1024 * 1024


@asynccontextmanager
async def _connected(at: TestInstance, path: str, **options: object) -> AsyncIterator[ClientConnection]:
    url = at.url.replace("http://", "ws://") + path
    async with asyncio.timeout(patience(LIMIT_S)):
        async with connect(url, max_size=None, **options) as socket:  # type: ignore[arg-type]
            yield socket


async def _closed(socket: ClientConnection) -> Close:
    """How the other side closes it, with nothing sent before."""
    with pytest.raises(ConnectionClosed) as closed:
        await socket.recv()
    assert closed.value.rcvd
    return closed.value.rcvd


async def _deploy(app: object, **options: object) -> None:
    @serve.deployment(name="served", max_concurrent_queries=1000, **options)  # type: ignore[call-overload]
    @serve.ingress(app)
    class Served:
        pass

    await asyncio.to_thread(Served.deploy)


def _echo() -> FastAPI:
    app = FastAPI()

    @app.websocket("/echo")
    async def echo(socket: WebSocket) -> None:
        await socket.accept()
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if message.get("text") is not None:
                await socket.send_text(message["text"])
            else:
                await socket.send_bytes(message["bytes"])

    return app


async def test_text_and_bytes_of_any_size_go_both_ways(qserve_instance: TestInstance) -> None:
    await _deploy(_echo())
    messages: list[str | bytes] = ["", "Grüße", b"", bytes(range(256)), "x" * 200_000, os.urandom(MIB), b"last"]

    # What is random grows when it is compressed, and the limit holds for frames, too.
    async with _connected(qserve_instance, "/served/echo", compression=None) as socket:
        for message in messages:
            await socket.send(message)
            assert await socket.recv() == message


async def test_a_message_over_1_mib_closes_with_1009(qserve_instance: TestInstance) -> None:
    await _deploy(_echo())

    async with _connected(qserve_instance, "/served/echo") as socket:
        await socket.send(bytes(MIB + 1))
        assert (await _closed(socket)).code == 1009


async def test_a_replica_may_send_larger_messages(qserve_instance: TestInstance) -> None:
    app = FastAPI()

    @app.websocket("/")
    async def large(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_bytes(bytes(5 * MIB))
        await socket.send_text("done")
        await socket.receive()

    await _deploy(app)

    async with _connected(qserve_instance, "/served/") as socket:
        assert await socket.recv() == bytes(5 * MIB)
        assert await socket.recv() == "done"


async def test_subprotocol_headers_path_and_query(qserve_instance: TestInstance) -> None:
    app = FastAPI()

    @app.websocket("/{name}")
    async def tell(socket: WebSocket, name: str, q: str) -> None:
        await socket.accept(subprotocol=socket.scope["subprotocols"][1], headers=[(b"x-answer", b"yes")])
        await socket.send_json([name, q, socket.headers["x-custom"], socket.scope["subprotocols"]])
        await socket.close()

    await _deploy(app)

    async with _connected(
        qserve_instance, "/served/Ada?q=1", subprotocols=["a", "b"], additional_headers={"X-Custom": "here"}
    ) as socket:
        assert socket.subprotocol == "b"
        assert socket.response
        assert socket.response.headers["x-answer"] == "yes"
        assert await socket.recv() == '["Ada","1","here",["a","b"]]'


async def test_close_codes_travel_both_ways(qserve_instance: TestInstance, notes: Notes) -> None:
    app = FastAPI()

    @app.websocket("/server")
    async def server(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close(4001, "enough")

    @app.websocket("/client")
    async def client(socket: WebSocket) -> None:
        await socket.accept()
        try:
            await socket.receive_text()
        except WebSocketDisconnect as gone:
            notes.add(f"{gone.code} {gone.reason}")

    await _deploy(app)

    async with _connected(qserve_instance, "/served/server") as socket:
        assert await _closed(socket) == Close(4001, "enough")
    async with _connected(qserve_instance, "/served/client") as socket:
        await socket.close(4002, "bye")
    assert await asyncio.to_thread(notes.wait_for, 1) == ["4002 bye"]


async def test_what_no_close_frame_can_say_is_not_sent(qserve_instance: TestInstance) -> None:
    app = FastAPI()

    @app.websocket("/{code}")
    async def server(socket: WebSocket, code: int) -> None:
        await socket.accept()
        await socket.close(code, "é" * 100)

    await _deploy(app)

    for code in (999, 1005, 1006, 5000):
        async with _connected(qserve_instance, f"/served/{code}") as socket:
            assert await _closed(socket) == Close(1011, "")
    async with _connected(qserve_instance, "/served/4000") as socket:
        assert await _closed(socket) == Close(4000, "é" * 61)


async def test_denials(qserve_instance: TestInstance) -> None:
    app = FastAPI()

    @app.websocket("/closed")
    async def closed(socket: WebSocket) -> None:
        await socket.close()

    @app.websocket("/denied")
    async def denied(socket: WebSocket) -> None:
        await socket.send_denial_response(JSONResponse({"why": "no"}, 418, {"x-why": "no"}))

    @app.websocket("/failing")
    async def failing(socket: WebSocket) -> None:
        raise ZeroDivisionError

    @app.websocket("/half-way")
    async def half_way(socket: WebSocket) -> None:
        async def parts() -> AsyncIterator[str]:
            yield "the beginning of a denial"
            raise ZeroDivisionError

        await socket.send_denial_response(StreamingResponse(parts(), 418))

    @serve.deployment
    def plain(request: Request) -> str:
        return "plain"

    await _deploy(app)
    await asyncio.to_thread(plain.deploy)

    async def refusal(path: str) -> InvalidStatus:
        with pytest.raises(InvalidStatus) as refused:
            async with _connected(qserve_instance, path):
                pass
        return refused.value

    closed_at_once = (await refusal("/served/closed")).response
    assert (closed_at_once.status_code, "x-request-id" in closed_at_once.headers) == (403, True)
    half = (await refusal("/served/half-way")).response
    assert half.status_code >= 500
    assert b"the beginning of a denial" not in (half.body or b"")
    assert (await refusal("/plain")).response.status_code == 403
    assert (await refusal("/nowhere")).response.status_code == 404
    assert (await refusal("/served/nowhere")).response.status_code in {403, 404}
    assert (await refusal("/served/failing")).response.status_code in {500, 502}
    teapot = (await refusal("/served/denied")).response
    assert (teapot.status_code, teapot.headers["x-why"], teapot.body) == (418, "no", b'{"why":"no"}')


async def test_an_error_closes_with_1011(qserve_instance: TestInstance) -> None:
    app = FastAPI()

    @app.websocket("/")
    async def failing(socket: WebSocket) -> None:
        await socket.accept()
        await socket.receive_text()
        raise ZeroDivisionError

    await _deploy(app)

    async with _connected(qserve_instance, "/served/") as socket:
        await socket.send("now")
        assert (await _closed(socket)).code == 1011


async def test_a_socket_stays_with_its_replica_and_its_state(qserve_instance: TestInstance) -> None:
    app = FastAPI()

    @app.websocket("/")
    async def count(socket: WebSocket) -> None:
        await socket.accept()
        seen = 0
        async for _ in socket.iter_text():
            seen += 1
            await socket.send_text(f"{os.getpid()} {seen}")

    await _deploy(app, num_replicas=2)

    async def talk() -> str:
        async with _connected(qserve_instance, "/served/") as socket:
            pids = set()
            for turn in range(1, 21):
                await socket.send("x")
                pid, seen = str(await socket.recv()).split()
                pids.add(pid)
                assert int(seen) == turn
            (only,) = pids
            return only

    assert len(set(await asyncio.gather(*(talk() for _ in range(20))))) == 2


async def test_500_clients_at_once(qserve_instance: TestInstance) -> None:
    await _deploy(_echo())

    async def talk(number: int) -> None:
        async with _connected(qserve_instance, "/served/echo", open_timeout=patience(LIMIT_S)) as socket:
            for turn in range(4):
                await socket.send(f"{number} {turn}")
                assert await socket.recv() == f"{number} {turn}"

    await asyncio.gather(*(talk(number) for number in range(500)))


async def test_a_wait_for_a_message_may_be_given_up(qserve_instance: TestInstance) -> None:
    app = FastAPI()

    @app.websocket("/")
    async def impatient(socket: WebSocket) -> None:
        await socket.accept()
        given_up = 0
        while True:
            try:
                message = await asyncio.wait_for(socket.receive_text(), 0.01)
            except TimeoutError:
                given_up += 1
                continue
            await socket.send_text(f"{message} {given_up > 0}")

    await _deploy(app)

    async with _connected(qserve_instance, "/served/") as socket:
        for message in ("one", "two", "three"):
            await asyncio.sleep(0.05)
            await socket.send(message)
            assert await socket.recv() == f"{message} True"


async def test_an_application_that_only_sends_hears_that_its_client_left(
    qserve_instance: TestInstance, notes: Notes
) -> None:
    app = FastAPI()

    @app.websocket("/")
    async def ticker(socket: WebSocket) -> None:
        await socket.accept()
        try:
            while True:
                await socket.send_text("tick")
                await asyncio.sleep(0.01)
        except WebSocketDisconnect:
            notes.add(socket.application_state == WebSocketState.DISCONNECTED)

    await _deploy(app)

    async with _connected(qserve_instance, "/served/") as socket:
        assert await socket.recv() == "tick"
    assert await asyncio.to_thread(notes.wait_for, 1) == ["True"]


async def test_a_replica_that_is_killed_closes_with_1011(qserve_instance: TestInstance, notes: Notes) -> None:
    app = FastAPI()

    @app.websocket("/")
    async def wait(socket: WebSocket) -> None:
        await socket.accept()
        notes.add(os.getpid())
        await socket.receive()

    await _deploy(app)

    async with _connected(qserve_instance, "/served/") as socket:
        pid = int((await asyncio.to_thread(notes.wait_for, 1))[0])
        os.kill(pid, signal.SIGKILL)
        assert (await _closed(socket)).code == 1011


async def test_a_redeploy_closes_with_1012_at_once(qserve_instance: TestInstance, notes: Notes) -> None:
    app = FastAPI()

    @app.websocket("/")
    async def wait(socket: WebSocket) -> None:
        await socket.accept()
        try:
            await socket.receive_text()
        except WebSocketDisconnect as gone:
            notes.add(gone.code)

    await _deploy(app, version="1")

    async with _connected(qserve_instance, "/served/") as socket:
        began = time.monotonic()
        deploying = asyncio.create_task(_deploy(app, version="2"))
        assert (await _closed(socket)).code == 1012
        assert await asyncio.to_thread(notes.wait_for, 1) == ["1012"]
        await deploying
        assert time.monotonic() - began < patience(15)  # nobody has waited for the grace period of 20 s


async def test_a_gateway_that_leaves_closes_with_1012(notes: Notes, gate: Gate) -> None:
    """Also where a handshake is under way, or the client is sending."""
    app = FastAPI()

    @app.websocket("/")
    async def wait(socket: WebSocket) -> None:
        await socket.accept()
        try:
            await socket.receive_text()
        except WebSocketDisconnect as gone:
            notes.add(gone.code)

    @app.websocket("/late")
    async def late(socket: WebSocket) -> None:
        notes.add("late")
        await gate.passed()
        await wait(socket)

    async def connect_late(running: TestInstance) -> Close:
        async with _connected(running, "/served/late") as socket:
            return await _closed(socket)

    with instance() as running:
        await _deploy(app)
        connecting = asyncio.create_task(connect_late(running))
        await asyncio.to_thread(notes.wait_for, 1)
        async with _connected(running, "/served/") as socket:
            os.kill(gateway_pid(running), signal.SIGTERM)
            assert (await _closed(socket)).code == 1012
        gate.open()
        assert (await connecting).code == 1012
        assert await asyncio.to_thread(notes.wait_for, 3) == ["late", "1012", "1012"]


async def test_reconfiguring_does_not_wait_for_open_sockets(qserve_instance: TestInstance) -> None:
    app = FastAPI()

    @serve.deployment(name="served", version="1", user_config={"word": "old"})
    @serve.ingress(app)
    class Served:
        def reconfigure(self, config: dict[str, str]) -> None:
            self.word = config["word"]

        @app.websocket("/")
        async def tell(self, socket: WebSocket) -> None:
            await socket.accept()
            async for _ in socket.iter_text():
                await socket.send_text(self.word)

    await asyncio.to_thread(Served.deploy)
    async with _connected(qserve_instance, "/served/") as socket:
        await socket.send("?")
        assert await socket.recv() == "old"
        await asyncio.to_thread(Served.options(user_config={"word": "new"}).deploy)
        await socket.send("?")
        assert await socket.recv() == "new"


async def test_sockets_that_end_free_their_slots(qserve_instance: TestInstance) -> None:
    app = FastAPI()

    @app.websocket("/")
    async def once(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(await socket.receive_text())

    @serve.deployment(name="served", max_concurrent_queries=2)
    @serve.ingress(app)
    class Served:
        pass

    await asyncio.to_thread(Served.deploy)
    for turn in range(10):
        async with _connected(qserve_instance, "/served/") as socket:
            await socket.send(str(turn))
            assert await socket.recv() == str(turn)
