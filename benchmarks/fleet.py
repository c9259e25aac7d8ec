"""Many connections and many deployments on one machine: `python -m benchmarks.fleet [SECTION ...]`.

The sections are the names of the functions in SECTIONS; without arguments all are measured. A full run is kept in
benchmarks/fleet.md.
"""

import asyncio
import contextlib
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import uvloop
from fastapi import FastAPI, WebSocket
from websockets.asyncio.client import connect

from benchmarks import node_growth, processes, small
from benchmarks.rows import HEADS, Row, machine
from qserve import serve
from qserve.broker.instance.state import State
from qserve.broker.server import embedded
from qserve.deployments import deploying
from qserve.deployments.driver import THIS_PROCESS
from qserve.deployments.local_instance import find_record
from qserve.settings import Settings
from qserve.testing import TestInstance, instance
from qserve.wire.messages import Signer
from qserve.wire.spec import DeploymentSpec, Target
from tests.support.gateways import gateway

RESULTS = Path(__file__).parent / "fleet.md"
FEW, MANY = 100, 10_000
"""Connections."""
RATE, SECONDS = 500, 20.0
WEBSOCKETS = 1_000
FEW_DEPLOYMENTS, MANY_DEPLOYMENTS, RUNNING = 10, 1_000, 200
_DEPLOYS = 9
_AT_ONCE = 100
_AFTERMATH_S = 15.0
"""How long deployments that have just started, and been called, are left alone before it is measured what they take."""
_LIMITS = {"QSERVE_HTTP_KEEP_ALIVE_S": "600", "QSERVE_HTTP_MAX_CONNECTIONS": "12000"}
_app = FastAPI()


@_app.websocket("/")
async def _echo(websocket: WebSocket) -> None:
    await websocket.accept()
    while True:
        await websocket.send_text(await websocket.receive_text())


@serve.deployment
async def noop(request: Any) -> str:
    """Answer at once."""
    return "ok"


@serve.deployment(max_concurrent_queries=2 * WEBSOCKETS)
@serve.ingress(_app)
class Sockets:
    """Holds WebSockets."""


# Connections


class _Connection(asyncio.Protocol):
    """A keep-alive connection, one request at a time."""

    def __init__(self, host: str) -> None:
        self._request = f"GET /noop HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        self._transport: Any = None
        self._answered: asyncio.Future[bool] | None = None
        self.is_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(data.startswith(b"HTTP/1.1 200 ") and data.endswith(b"\r\n\r\nok"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(False)

    async def ask(self) -> bool:
        """Send a request; whether it was answered as it should be."""
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(self._request)
        return await self._answered

    def close(self) -> None:
        self._transport.close()


async def _open(url: str, count: int) -> list[_Connection]:
    address = urlsplit(url)
    host, port = str(address.hostname), address.port or 80
    loop, found = asyncio.get_running_loop(), []
    for start in range(0, count, _AT_ONCE):
        batch = [
            loop.create_connection(lambda: _Connection(address.netloc), host, port)
            for _ in range(min(_AT_ONCE, count - start))
        ]
        found += [protocol for _, protocol in await asyncio.gather(*batch)]
    return found


async def _load(connections: list[_Connection]) -> tuple[list[float], int]:
    """Requests at random moments over each connection in turn; the seconds from when each was due, and failures."""
    loop, chance = asyncio.get_running_loop(), random.Random(1)
    seconds, failed, asking = [], 0, set()

    async def ask(connection: _Connection, due: float) -> None:
        nonlocal failed
        if await connection.ask():
            seconds.append(loop.time() - due)
        else:
            failed += 1

    due, number = loop.time(), 0
    end = due + SECONDS
    while due < end:
        await asyncio.sleep(max(0.0, due - loop.time()))
        task = asyncio.create_task(ask(connections[number % len(connections)], due))
        asking.add(task)
        task.add_done_callback(asking.discard)
        due, number = due + chance.expovariate(RATE), number + 1
    await asyncio.gather(*asking)
    return seconds, failed


def connections() -> list[Row]:
    """Open connections that are idle most of the time."""
    with _instance() as running:
        noop.deploy()
        pid = _gateway_of(running)
        few, _ = uvloop.run(_with_connections(running.url, FEW, lambda: 0.0))
        before = processes.pss_mib(pid)
        many, (after, failed) = uvloop.run(_with_connections(running.url, MANY, lambda: processes.pss_mib(pid)))
    each_kib = (after - before) * 1024 / MANY
    fast, slow = _p99(few), _p99(many)
    return [
        Row(f"p99 of {RATE} requests/s over {FEW} connections", f"{1000 * fast:.1f} ms"),
        Row(
            f"p99 of {RATE} requests/s over {MANY:,} open connections",
            f"{1000 * slow:.1f} ms, {slow / fast:.2f} x",
            "<= 1.5 x",
            slow <= 1.5 * fast,
        ),
        Row("requests that were not answered, or connections lost", f"{failed}", "0", failed == 0),
        Row("memory of the gateway for each of them (PSS)", f"{each_kib:.1f} KiB", "< 20 KiB", each_kib < 20),
    ]


async def _with_connections(
    url: str, count: int, measure: Callable[[], float]
) -> tuple[list[float], tuple[float, int]]:
    opened = await _open(url, count)
    seconds, failed = await _load(opened)
    measured = measure()
    lost = sum(not connection.is_open for connection in opened)
    for connection in opened:
        connection.close()
    return seconds, (measured, failed + lost)


def websockets() -> list[Row]:
    """Open WebSockets on which nothing happens."""
    with _instance() as running:
        Sockets.deploy()
        [replica] = serve.status()["Sockets"].replicas
        pids = {"gateway": _gateway_of(running), "replica": replica.pid}
        before = {part: processes.pss_mib(pid) for part, pid in pids.items()}
        seconds, after = uvloop.run(_with_websockets(running.url, pids))
    each = {part: (after[part] - before[part]) * 1024 / WEBSOCKETS for part in pids}
    return [
        Row(f"opening {WEBSOCKETS:,} WebSockets", f"{seconds:.1f} s"),
        Row("memory for each, while it is idle", ", ".join(f"{part} {kib:.0f} KiB" for part, kib in each.items())),
        Row("those that echo afterwards", f"{WEBSOCKETS:,} of {WEBSOCKETS:,}", "all", passed=True),
    ]


async def _with_websockets(url: str, pids: dict[str, int]) -> tuple[float, dict[str, float]]:
    began = time.perf_counter()
    async with contextlib.AsyncExitStack() as stack:
        opened = []
        for _ in range(WEBSOCKETS // _AT_ONCE):
            batch = [connect(f"ws{url[4:]}/Sockets/", compression=None, open_timeout=60) for _ in range(_AT_ONCE)]
            opened += await asyncio.gather(*(stack.enter_async_context(each) for each in batch))
        seconds = time.perf_counter() - began
        after = {part: processes.pss_mib(pid) for part, pid in pids.items()}
        for number, each in enumerate(opened):
            await each.send(str(number))
        for number, each in enumerate(opened):
            assert await each.recv() == str(number)
    return seconds, after


# Deployments


def state() -> list[Row]:
    """Deployments that are known and have no replica."""
    starts, deploys = {}, {}
    for count in (FEW_DEPLOYMENTS, MANY_DEPLOYMENTS):
        with _empty_state() as (settings, known):
            for number in range(count):
                _put(known, f"known{number}")
            began = time.perf_counter()
            with gateway(settings) as running:
                starts[count] = time.perf_counter() - began
                assert "url" in running.ready, running.ready
                deploys[count] = statistics.median(_deploy(known, f"further{number}") for number in range(_DEPLOYS))
    few, many = deploys[FEW_DEPLOYMENTS], deploys[MANY_DEPLOYMENTS]
    start = starts[MANY_DEPLOYMENTS]
    return [
        Row(f"start of a gateway with {FEW_DEPLOYMENTS} deployments", f"{starts[FEW_DEPLOYMENTS]:.2f} s"),
        Row(f"start of a gateway with {MANY_DEPLOYMENTS:,} deployments", f"{start:.2f} s", "< 2 s", start < 2),
        Row(f"a deploy beside {FEW_DEPLOYMENTS}, until the gateway knows it", f"{1000 * few:.1f} ms"),
        Row(
            f"a deploy beside {MANY_DEPLOYMENTS:,}, until the gateway knows it",
            f"{1000 * many:.1f} ms",
            "within 25 ms of that",
            many - few < 0.025,
        ),
    ]


@contextlib.contextmanager
def _empty_state() -> Iterator[tuple[Settings, State]]:
    with tempfile.TemporaryDirectory(prefix="qs-") as name:
        folder = Path(name)
        server = subprocess.Popen(embedded.command(folder))
        try:
            settings = Settings(redis_url=embedded.redis_url(folder), secret="of a benchmark")
            known = State(settings.redis_url, settings.keys, Signer(settings.secrets))
            while not known.ping():
                time.sleep(0.01)
            with contextlib.closing(known):
                yield settings, known
        finally:
            server.kill()
            server.wait()


def _put(known: State, name: str) -> Any:
    spec = DeploymentSpec(name=name, target=Target("m:f"), revision="r", is_class=False, route_prefix=f"/{name}")
    return deploying.deploy(known, spec)


def _deploy(known: State, name: str) -> float:
    began = time.perf_counter()
    _put(known, name).wait(60)
    return time.perf_counter() - began


def running() -> list[Row]:
    """Deployments with a replica each."""
    memory = psutil.virtual_memory().available
    with _instance() as it:
        names = [f"running{number}" for number in range(RUNNING)]
        began = time.perf_counter()
        current = THIS_PROCESS.current()
        made = (serve.deployment(name=name)(small.answer) for name in names)
        for goal in [current.put(each.to_spec(current.codec)) for each in made]:
            goal.wait(120)
        seconds = time.perf_counter() - began
        for name in names:
            urllib.request.urlopen(f"{it.url}/{name}", timeout=60).close()
        used_mib = (memory - psutil.virtual_memory().available) / 2**20
        record = find_record(it.settings.namespace)
        assert record is not None
        time.sleep(_AFTERMATH_S)
        idle = processes.cpu_percent(processes.tree(record.pid), 10)
    return [
        Row(f"{RUNNING} deployments with a replica each, until all serve", f"{seconds:.0f} s"),
        Row("memory of the machine for each of them", f"{used_mib / RUNNING:.0f} MiB"),
        Row("processor time of all its processes while nobody calls", f"{idle:.0f} % of a core"),
    ]


def nodes() -> list[Row]:
    """More nodes with the same deployments."""
    with _empty_state() as (settings, known):
        return node_growth.growth(settings, known)


# The run


@contextlib.contextmanager
def _instance() -> Iterator[TestInstance]:
    os.environ |= _LIMITS
    with instance() as running:
        yield running


def _gateway_of(running: TestInstance) -> int:
    known = State(running.settings.redis_url, running.settings.keys, Signer(running.settings.secrets))
    with contextlib.closing(known):
        [found] = [info.pid for info in known.observed.gateways().values()]
    return found


def _p99(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) * 99 // 100]


SECTIONS: dict[str, Callable[[], list[Row]]] = {
    each.__name__: each for each in (connections, websockets, state, running, nodes)
}


def main() -> None:
    """Measure the sections that are named, and print their rows; all of them go into the file of results."""
    names = sys.argv[1:] or list(SECTIONS)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    lines = [*HEADS]
    for name in names:
        lines += [f"| {row.what} | {row.measured} | {row.target} | {row.verdict} |" for row in SECTIONS[name]()]
        print("\n".join(lines[-6:]), flush=True)
    if names == list(SECTIONS):
        head = f"# Many connections, many deployments\n\n{machine()}. `python -m benchmarks.fleet`\n\n"
        RESULTS.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
