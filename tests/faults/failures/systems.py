"""A server of the test's own with replicas, callers and gateways around it, all of which can be harmed."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from qserve.calls.pending import PendingCall
from qserve.settings import Settings
from qserve.wire.messages import Outcome
from qserve.wire.spec import SERVING
from tests.support.calling import Caller, within
from tests.support.calling import calling as calling_mainly
from tests.support.chosen_server import client_of, server_to_hurt
from tests.support.cluster import ClusterAsServer
from tests.support.faulty_link import FaultyLink
from tests.support.gateways import Gateway, gateway
from tests.support.replicas import NAME, Host, World
from tests.support.servers import SECRET, Server
from tests.support.slowness import patience

PATIENCE_S = 45.0
"""How long anything may take on a busy machine."""


@dataclass
class System:
    """One server, one deployment."""

    server: Server | ClusterAsServer
    world: World
    stack: ExitStack
    gone: list[Caller] = field(default_factory=list)

    @property
    def settings(self) -> Settings:
        return self.world.settings

    def link(self) -> FaultyLink:
        """A line to the server that can go bad."""
        return self.stack.enter_context(FaultyLink(self.server.url))

    def behind(self, link: FaultyLink) -> Settings:
        """Settings of somebody on the far side of a line."""
        return self.settings.model_copy(update={"redis_url": link.url})

    async def replica_behind(self, link: FaultyLink) -> Host:
        host = Host(self.behind(link), self.world.folder)
        self.world.hosts.append(host)
        return await host.reached(SERVING)

    def gateway(self, settings: Settings | None = None, **variables: object) -> Gateway:
        return self.stack.enter_context(gateway(settings or self.settings, **variables))

    def client(self, served: Gateway) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=served.ready["url"], timeout=patience(PATIENCE_S))

    def depth(self) -> int:
        return int(self.world.redis.xlen(self.world.keys.calls(NAME)))


@asynccontextmanager
async def system(
    *, keeps_data: bool = True, dead_after_s: float = 3.0, replicas: int = 2, strict: bool = False, **spec: Any
) -> AsyncIterator[System]:
    """A deployment of `tests.support.replica_code:Code` at /code with its replicas."""
    folder = Path(tempfile.mkdtemp(prefix="qs-"))
    server = server_to_hurt(folder, keeps_data=keeps_data)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        stack.callback(server.kill)
        stack.callback(server.thaw)
        client = stack.enter_context(client_of(server.url))
        settings = Settings(redis_url=server.url, secret=SECRET, namespace="test", strict=strict)
        world = World(settings, client, folder)
        world.settings = world.settings.model_copy(update={"dead_after_s": patience(dead_after_s)})
        stack.callback(stop, world)
        world.deploy(route_prefix="/code", **spec)
        await world.start(replicas)
        yield System(server, world, stack)


def calling(settings: Settings) -> AbstractAsyncContextManager[Caller]:
    """A caller, connected."""
    return calling_mainly(settings, NAME)


def stop(world: World) -> None:
    world.books.gate.open()
    for host in world.hosts:
        host.process.kill()
        host.process.wait()


def put(
    caller: Caller, method: str, argument: object, *, safe: bool = False, timeout_s: float = 60
) -> "tuple[PendingCall, asyncio.Future[Outcome]]":
    """Put a call to the deployment."""
    return caller.call(argument, method, deployment=NAME, safe=safe, timeout_s=timeout_s)


async def outcome(future: "asyncio.Future[Outcome]") -> Outcome:
    return await within(future, PATIENCE_S)


async def value(caller: Caller, future: "asyncio.Future[Outcome]") -> object:
    return caller.value(await outcome(future))


async def ask(caller: Caller, name: str) -> object:
    """Whether the deployment serves: the gate has to be open."""
    return await value(caller, put(caller, "wait", name)[1])


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began


__all__ = ["NAME"]
