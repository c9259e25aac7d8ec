"""Gateways behind a load balancer are restarted one after another: no request is lost, no client is left in doubt."""

import asyncio
import http.client
import re
import shutil
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from fastapi import FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import connect

from qserve import serve
from qserve.settings import Settings
from qserve.testing import TestInstance
from tests.support.gateways import gateway
from tests.support.serving import ROOT, free_port
from tests.support.slowness import patience
from tests.support.waiting import wait_until

CLIENTS = 6


@contextmanager
def balancer(name: str, folder: Path, front: int, gateways: list[int]) -> Iterator[None]:
    """Runs one with its shipped configuration, but for the ports."""
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    source = {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}[name]
    ports = dict(zip(("8000", "8001", "8002"), map(str, (front, *gateways)), strict=True))
    text = re.sub(r"\b800[012]\b", lambda found: ports[found[0]], (ROOT / "deploy/balancers" / source).read_text())
    if name == "nginx":
        own = "".join(f"{it}_temp_path {folder}/{it};" for it in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        text = f"daemon off; pid {folder}/pid; error_log {folder}/errors;\n" + text
        text = text.replace("http {", f"http {{ access_log off; {own}", 1)
    file = folder / source
    file.write_text(text)
    command = {"haproxy": ["haproxy", "-db", "-f"], "nginx": ["nginx", "-p", str(folder), "-c"]}[name]
    process = subprocess.Popen([*command, str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


class Load:
    """Clients that do something again and again, each on a thread of its own, and what they have seen."""

    def __init__(self, port: int, client: "Callable[[Load, int], None]") -> None:
        self.port = port
        self.seen: Counter[object] = Counter()
        self.enough = threading.Event()
        self._threads = [threading.Thread(target=client, args=(self, number)) for number in range(CLIENTS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.enough.set()
        for thread in self._threads:
            thread.join()

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=patience(60))

    def go_on(self, times: int = 200) -> None:
        """Wait until they have seen a good many more things."""
        before = self.seen.total()
        wait_until(lambda: self.seen.total() > before + times, shows=lambda: self.seen)


def requests(load: Load, number: int) -> None:
    """One request after another over a connection that stays open; every other client sends POST."""
    connection = load.connection()
    while not load.enough.is_set():
        try:
            connection.request("POST" if number % 2 else "GET", "/echo", b"x" * 100 if number % 2 else None)
            response = connection.getresponse()
            response.read()
            load.seen[response.status] += 1
        except (OSError, http.client.HTTPException) as error:
            load.seen[repr(error)] += 1
            connection.close()
    connection.close()


def short_streams(load: Load, _number: int) -> None:
    """One stream after another, each of which ends well within the time that a gateway has for it."""
    while not load.enough.is_set():
        with closing(load.connection()) as connection:
            try:
                connection.request("GET", "/talks/20")
                response = connection.getresponse()
                load.seen[response.status, response.read() == b"part" * 20] += 1
            except (OSError, http.client.HTTPException) as error:
                load.seen[repr(error)] += 1


def endless_streams(load: Load, _number: int) -> None:
    """A stream that never ends, and another one once it has been cut."""
    while not load.enough.is_set():
        with closing(load.connection()) as connection:
            try:
                connection.request("GET", "/talks/1000000")
                response = connection.getresponse()
                load.seen[response.status] += 1
                while response.read(4) and not load.enough.is_set():
                    pass
                load.seen["ended as if it were whole"] += not load.enough.is_set()
            except (OSError, http.client.HTTPException):
                load.seen["cut"] += 1


def sockets(load: Load, _number: int) -> None:
    """A WebSocket that says something and hears it, and another one once it is closed."""
    while not load.enough.is_set():
        try:
            with connect(f"ws://127.0.0.1:{load.port}/talks/echo", open_timeout=patience(60)) as socket:
                while not load.enough.wait(0.02):
                    socket.send("here")
                    load.seen[socket.recv(patience(60))] += 1
        except ConnectionClosed as closed:
            load.seen[closed.rcvd.code if closed.rcvd else "cut"] += 1
        except (OSError, WebSocketException) as error:
            load.seen[repr(error)] += 1


def answers(port: int, path: str) -> bool:
    """Whether it is served there."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


@contextmanager
def restartable_gateways(settings: Settings, ports: list[int], *options: str) -> Iterator[list[Callable[[], None]]]:
    """Runs one on each port, until the end of the block; gives what restarts each of them."""
    with ExitStack() as stack:

        def start(port: int) -> Callable[[], None]:
            running = stack.enter_context(gateway(settings, "--port", str(port), *options))

            def restart() -> None:
                running.process.send_signal(signal.SIGTERM)
                running.process.wait()
                start(port)
                wait_until(lambda: answers(port, "/-/readyz"))

            return restart

        yield [start(port) for port in ports]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["haproxy", "nginx"])
def test_a_rolling_restart_of_the_gateways_loses_no_request(
    name: str, qserve_instance: TestInstance, tmp_path: Path
) -> None:
    @serve.deployment
    async def echo() -> str:
        return "here"

    echo.deploy()
    front, *ports = (free_port() for _ in range(3))
    with (
        restartable_gateways(qserve_instance.settings, ports) as restarts,
        balancer(name, tmp_path, front, ports),
    ):
        wait_until(lambda: answers(front, "/echo"))
        with Load(front, requests) as load:
            for restart in restarts:
                load.go_on()
                restart()
                load.go_on()

    assert load.seen.keys() == {200}, load.seen


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["haproxy", "nginx"])
def test_a_rolling_restart_ends_what_takes_long_so_that_its_client_knows(
    name: str, qserve_instance: TestInstance, tmp_path: Path
) -> None:
    """Streams end whole if they end in time, else they are cut for all to see; WebSockets are told to connect again."""
    app = FastAPI()

    @app.get("/{parts}")
    async def stream(parts: int) -> StreamingResponse:
        async def talk() -> AsyncIterator[bytes]:
            for _ in range(parts):
                yield b"part"
                await asyncio.sleep(0.01)

        return StreamingResponse(talk())

    @app.websocket("/echo")
    async def echo(socket: WebSocket) -> None:
        await socket.accept()
        async for text in socket.iter_text():
            await socket.send_text(text)

    @serve.deployment(name="talks")
    @serve.ingress(app)
    class Talks:
        pass

    Talks.deploy()
    front, *ports = (free_port() for _ in range(3))
    in_time = ("--graceful-shutdown-timeout", str(round(patience(1))))
    with (
        restartable_gateways(qserve_instance.settings, ports, *in_time) as restarts,
        balancer(name, tmp_path, front, ports),
    ):
        wait_until(lambda: answers(front, "/talks/1"))
        kinds = (short_streams, endless_streams, sockets)
        with ExitStack() as loads:
            short, endless, talking = (loads.enter_context(Load(front, each)) for each in kinds)
            wait_until(lambda: endless.seen[200] >= CLIENTS)
            for restart in restarts:
                short.go_on(20)
                talking.go_on()
                restart()
            wait_until(lambda: endless.seen[200] == CLIENTS + endless.seen["cut"], shows=lambda: endless.seen)
            short.go_on(20)
            talking.go_on()

    assert short.seen.keys() == {(200, True)}, short.seen
    assert set(+endless.seen) == {200, "cut"}, endless.seen
    assert set(talking.seen) == {"here", 1012}, talking.seen
    assert min(endless.seen["cut"], talking.seen[1012]) >= CLIENTS
