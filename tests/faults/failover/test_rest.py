"""Connections that lay idle while the primary moved, and whose server has not heard of it yet."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from qserve.broker.server import redis_clients
from qserve.broker.server.address import Address, Broker
from tests.faults.failover.sentinels import DATA, LOGIN, SERVICE, Server
from tests.support.waiting import wait_until

URL = f"redis+sentinel://{LOGIN}@nowhere/{SERVICE}"


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    """Two that both believe to be the primary; who lets one in looks at its keys."""
    with tempfile.TemporaryDirectory(prefix="qs-") as folder:
        servers = [Server(Path(folder) / name, DATA) for name in "ab"]
        for server in servers:
            server.start()
        wait_until(lambda: all(server.role() == "master" for server in servers))
        yield servers
        for server in servers:
            server.kill()


@pytest.fixture
def told(servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> list[Address]:
    """What the sentinels tell; at first the first server."""
    told = [("127.0.0.1", servers[0].port)]

    async def tell_async(_broker: Broker, _problems: list[str]) -> AsyncIterator[Address]:
        for address in told:
            yield address

    monkeypatch.setattr(redis_clients, "primaries", lambda _broker, _problems: iter(told))
    monkeypatch.setattr(redis_clients, "primaries_async", tell_async)
    return told


async def test_a_connection_that_has_rested_asks_where_the_primary_is(
    servers: list[Server], told: list[Address], monkeypatch: pytest.MonkeyPatch
) -> None:
    with redis_clients.client(URL, 5) as client:
        async with redis_clients.asyncio_client(URL, 5) as other:
            for moment in ("before", "meanwhile", "rested"):
                if moment == "meanwhile":
                    told[:] = [("127.0.0.1", servers[1].port)]
                elif moment == "rested":
                    monkeypatch.setattr(redis_clients, "_REST_S", 0)
                client.set(f"{moment}-sync", 1)
                await other.set(f"{moment}-async", 1)
            told.clear()  # no sentinel answers: what there is has to do
            assert client.get("rested-sync") == b"1"
            assert await other.get("rested-async") == b"1"
    with servers[0].client() as old, servers[1].client() as new:
        assert sorted(old.keys()) == [b"before-async", b"before-sync", b"meanwhile-async", b"meanwhile-sync"]
        assert sorted(new.keys()) == [b"rested-async", b"rested-sync"]
