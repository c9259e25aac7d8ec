"""Fixtures: a cluster, and an instance that was told of three of its nodes."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qserve.broker.keys import Keys
from qserve.broker.server.acl import ROLES, rules
from qserve.broker.server.address import SHARDS, parse
from tests.support.cluster import PASSWORD, Cluster, ClusterNode
from tests.support.shell import Shell
from tests.support.started import own_calls, served, shell_for

__all__ = ["own_calls", "served"]

KEYS = Keys("default", SHARDS)

APP = """
    from qserve import serve

    def value_of(value):
        return value if isinstance(value, int) else value.query_params["value"]

    @serve.deployment(version="1", idempotent=True)
    def echo(value):
        return value_of(value)

    @serve.deployment(version="1", idempotent=True)
    def Echo2(value):
        return value_of(value)

    @serve.deployment(
        version="1", autoscaling_config={"min_replicas": 0, "max_replicas": 1, "downscale_to_zero_delay_s": 0.5}
    )
    def Drowsy(value):
        return value_of(value)

    @serve.deployment(version="1")
    class Chain:
        def __init__(self):
            self.echo = serve.get_deployment("echo").get_handle(sync=False)

        async def __call__(self, value):
            return await (await self.echo.remote(value))

        async def count(self, limit):
            for number in range(limit):
                yield number

        async def orders(self, value):
            return (await self.echo.options(durable=True).remote(value)).id

        async def same(self, data):
            return data
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="qs-"))
    worker = next(role for role in ROLES if role.name == "worker")
    cluster = Cluster(folder, user=("calls", *rules(worker, KEYS, [f">{PASSWORD}"])))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.kill()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def shell(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    with shell_for(cluster.url, APP, tmp_path_factory.mktemp("app")) as shell:
        yield shell


def slot_of_deployment(name: str) -> int:
    """The slot in which everything of a deployment lies."""
    return parse(KEYS.of(name).address("redis+cluster://x")).slot


def slot_of_home() -> int:
    """The slot in which the state of the instance lies."""
    return parse(KEYS.address("redis+cluster://x")).slot


def another_primary(cluster: Cluster, slot: int) -> ClusterNode:
    """A primary that does not have a slot."""
    owner = cluster.primary_of(slot)
    return next(cluster.primary_of(each) for each in (0, 8000, 16000) if cluster.primary_of(each) is not owner)
