"""The server of the tests: a Valkey, or with QSERVE_TEST_SERVER=cluster a cluster of three."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from qserve import serve
from qserve.broker.server import embedded
from qserve.broker.server.address import parse
from qserve.broker.server.redis_clients import client, client_at, primaries_of_cluster
from qserve.deployments.local_instance import find_record, find_settings
from qserve.testing import TestInstance, instance
from tests.support.cluster import SYNCS, Cluster, ClusterAsServer
from tests.support.servers import SECRET, Server, wait_until_accepting
from tests.support.serving import runtime_folder
from tests.support.slowness import patience

IS_CLUSTER = os.environ.get("QSERVE_TEST_SERVER") == "cluster"
"""Read once: tests run without settings of the one who starts them."""

needs_one_server = pytest.mark.skipif(IS_CLUSTER, reason="says something about a server that is no cluster")


def server_to_hurt(folder: Path, *, keeps_data: bool = True) -> Server | ClusterAsServer:
    """A server that can die and come back, with its data or without."""
    if not IS_CLUSTER:
        return Server(folder, keeps_data=keeps_data)
    server = ClusterAsServer(Cluster(folder, replicas=False, persistent=keeps_data, options=SYNCS * keeps_data))
    server.cluster.start()
    return server


@contextlib.contextmanager
def running_server() -> Iterator[str]:
    """The URL of a server that runs until the end of the block."""
    folder = Path(tempfile.mkdtemp(prefix="qs-"))
    try:
        if IS_CLUSTER:
            cluster = Cluster(folder, replicas=False)
            try:
                cluster.start()
                yield cluster.url
            finally:
                cluster.kill()
            return
        valkey = subprocess.Popen(embedded.command(folder))
        try:
            wait_until_accepting(embedded.socket_path(folder), valkey)
            yield embedded.redis_url(folder)
        finally:
            valkey.kill()
            valkey.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running_instance() -> Iterator[TestInstance]:
    """A whole instance, which is the one of this process until the end of the block."""
    if not IS_CLUSTER:
        with instance() as running:
            yield running
        return
    with running_server() as url, runtime_folder() as folder, pytest.MonkeyPatch.context() as variables:
        variables.setenv("QSERVE_RUNTIME_DIR", str(folder))
        with pytest.MonkeyPatch.context() as at_start:
            at_start.setenv("QSERVE_REDIS_URL", url)
            at_start.setenv("QSERVE_SECRET", SECRET)
            serve.start(http_options={"port": 0})
        try:
            record = find_record("default")
            assert record is not None
            yield TestInstance(record.gateway_url, find_settings())
        finally:
            serve.shutdown()


@contextlib.contextmanager
def client_of(url: str) -> Iterator["redis.Redis"]:
    """A client of the server with a URL; of a cluster it sends each command to the server that has its keys."""
    if not parse(url).nodes:
        with redis.Redis.from_url(url, protocol=2) as plain:
            yield plain
        return
    routed: Any = client(url, patience(20))
    try:
        yield routed
    finally:
        routed.close()


def empty(url: str) -> None:
    """Delete every key."""
    broker = parse(url)
    if not broker.nodes:
        with client_of(url) as plain:
            plain.flushall()
        return
    for address in primaries_of_cluster(broker, {})[0]:
        with client_at(broker, address, patience(20)) as primary:
            primary.flushall()
