"""Calls go on while what answers them is replaced, broken, moved and taken away: none fails."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from qserve.broker.instance.state import State
from qserve.deployments import deploying
from qserve.wire.spec import EVERY_NODE, HttpSettings
from tests.instance.scaling.load import Load
from tests.instance.scaling.loaded import Blocking, Loaded
from tests.support.nodes import StartNode, spec
from tests.support.serving import free_port
from tests.support.slowness import patience
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(120)


def deploy(state: State, notes: Path, deployment: Any = Loaded, *, seconds: float = 0.002, **options: Any) -> None:
    start = options.pop("start", "0")
    deploying.deploy(state, spec(deployment.options(init_args=(str(notes), seconds, start), **options))).wait(
        patience(60)
    )


def gateways(state: State, count: int = 1) -> list[str]:
    wait_until(lambda: len(state.observed.gateways()) >= count)
    return [info.url for info in state.observed.gateways().values()]


@pytest.mark.parametrize("deployment", [Loaded, Blocking])
def test_redeploys_and_changed_configs(start_node: StartNode, state: State, notes: Path, deployment: Any) -> None:
    start_node("--gateway", "--port", "0", "--exact")
    deploy(state, notes, deployment, num_replicas=2)
    with Load(deployment.name, notes, urls=gateways(state)) as load:
        for n in range(3):
            load.more()
            deploy(state, notes, deployment, num_replicas=2, version=f"v{n}")
        for n in range(3):
            load.more()
            deploy(state, notes, deployment, num_replicas=2, version="v2", user_config={"n": n})
            load.until(lambda each, n=n: each.result["config"] == {"n": n})  # type: ignore[misc]
        for replicas in (4, 1, 2):
            load.more()
            deploy(state, notes, deployment, num_replicas=replicas, version="v2")
        load.more()
    load.check()


def test_failed_deploys(start_node: StartNode, state: State, notes: Path) -> None:
    start_node("--gateway", "--port", "0", "--exact")
    deploy(state, notes, user_config="good")
    replicas = set(state.observed.replicas("Loaded"))
    with Load("Loaded", notes, urls=gateways(state)) as load:
        for change in ({"start": "raise"}, {"start": "hang", "initialization_timeout_s": 0.3}, {"user_config": "bad"}):
            load.more()
            with pytest.raises(RuntimeError, match="Failed to reach deployment goal"):
                deploy(state, notes, **{"user_config": "good"} | change)
        load.more()
    load.check()
    assert set(state.observed.replicas("Loaded")) == replicas


def test_nodes_come_and_go(start_node: StartNode, state: State, notes: Path) -> None:
    nodes = [start_node("--gateway", "--port", "0")]
    deploy(state, notes)
    with Load("Loaded", notes, urls=gateways(state)) as load:
        nodes += [start_node(wait=False) for _ in range(3)]
        wait_until(lambda: len(state.observed.replicas("Loaded")) == 4)
        load.more()
        for node in nodes[1:]:
            node.terminate()
        for node in nodes[1:]:
            assert node.wait(patience(40)) == 0
        load.more()
    load.check()


def test_through_zero_workers(start_node: StartNode, state: State, notes: Path) -> None:
    start_node("--gateway", "--port", "0", "--only", "Nothing")
    worker = start_node()
    deploy(state, notes)
    with Load("Loaded", notes, urls=gateways(state)) as load:
        for _ in range(2):
            load.more()
            worker.terminate()
            assert worker.wait(patience(40)) == 0
            wait_until(lambda: state.observed.queued("Loaded") >= 4)
            worker = start_node()
        load.more()
    load.check()


def test_gateways_restart(start_node: StartNode, state: State, notes: Path) -> None:
    def start_gateway(port: int) -> "subprocess.Popen[bytes]":
        return start_node("--gateway", "--port", str(port), "--only", "Nothing", wait=False)

    start_node()
    deploy(state, notes, seconds=0.05)
    ports = [free_port(), free_port()]
    first, second = (start_gateway(port) for port in ports)
    with Load("Loaded", notes, urls=gateways(state, 2), http=6, handles=1) as load:
        load.more()
        first.terminate()
        assert first.wait(patience(40)) == 0
        load.more()
        start_gateway(ports[0])
        gateways(state, 2)
        second.terminate()
        assert second.wait(patience(40)) == 0
        load.more()
    load.check()


def test_gateways_beside_every_node_share_a_port(start_node: StartNode, state: State, notes: Path) -> None:
    state.set_http(HttpSettings(location=EVERY_NODE))
    port = str(free_port())
    leaving, _staying = start_node("--port", port, wait=False), start_node("--port", port, wait=False)
    start_node("--port", port, "--no-gateway")
    deploy(state, notes)
    urls = gateways(state, 2)
    assert urls == [f"http://127.0.0.1:{port}"] * 2
    with Load("Loaded", notes, urls=urls[:1], http=6, handles=0, durable=0) as load:
        load.more()
        leaving.terminate()
        assert leaving.wait(patience(40)) == 0
        load.more()
    load.check()
    assert len(state.observed.gateways()) == 1
