"""Nodes as `qserve start` runs them, on the session's Valkey."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from qserve.broker.instance.state import State
from qserve.deployments.deployment import Deployment
from qserve.settings import Settings
from qserve.wire.codec import Codec
from qserve.wire.spec import DeploymentSpec
from tests.support.processes import command_line
from tests.support.serving import ROOT
from tests.support.slowness import patience
from tests.support.waiting import wait_until

StartNode = Callable[..., "subprocess.Popen[bytes]"]


def spec(deployment: "Deployment[Any]") -> DeploymentSpec:
    """What a deploy writes."""
    return deployment.to_spec(Codec(allow_pickle=True, max_bytes=1_000_000))


def workers_of(node: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The workers of a node."""
    children = psutil.Process(node.pid).children()
    return [child for child in children if command_line(child).startswith("qserve: worker of")]


@pytest.fixture
def start_node(settings: Settings, state: State) -> Iterator[StartNode]:
    """Starts nodes on the session's Valkey; at the end they get SIGTERM and must leave nothing running."""
    nodes: list[subprocess.Popen[bytes]] = []
    given = {
        "QSERVE_REDIS_URL": settings.redis_url,
        "QSERVE_SECRET": settings.secret,
        "QSERVE_NAMESPACE": settings.namespace,
    }

    def start(*options: str, wait: bool = True) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "qserve_workers.node", *options]
        node = subprocess.Popen(command, env=os.environ | given, cwd=ROOT)
        nodes.append(node)
        if wait:
            wait_until(lambda: any(info.pid == node.pid for info in state.observed.nodes().values()))
        return node

    yield start
    running = [node for node in nodes if node.poll() is None]
    children = [child for node in running for child in psutil.Process(node.pid).children(recursive=True)]
    for node in nodes:
        node.terminate()
    for node in nodes:
        node.wait(patience(40))
    wait_until(lambda: not [child for child in children if child.is_running()], limit_s=5)
