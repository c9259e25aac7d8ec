"""What several files of this folder work with."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from qserve.settings import Settings
from tests.support.replicas import World


@pytest.fixture
def world(settings: Settings, redis_client: "redis.Redis", tmp_path: Path) -> Iterator[World]:
    """A namespace in which heartbeats are quick; all of its processes are gone afterwards."""
    world = World(settings, redis_client, tmp_path)
    yield world
    world.end()


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    """Where a process that is given it listens; nobody does yet."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock
