"""Replicas follow the load: a burst brings more, quiet takes idle ones away, and no call notices."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qserve import serve
from qserve.broker.instance.state import State
from qserve.deployments import deploying
from qserve.settings import Settings
from qserve.wire.spec import SERVING
from tests.instance.scaling.load import Load
from tests.instance.scaling.loaded import Blocking, Loaded
from tests.support.nodes import StartNode, spec
from tests.support.serving import ROOT
from tests.support.slowness import patience
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(120)

QUICK = {"max_replicas": 3, "target_ongoing_requests": 2, "upscale_delay_s": 0.5, "downscale_delay_s": 1}


def deploy(state: State, notes: Path, deployment: Any = Loaded, seconds: float = 0.002, **options: Any) -> None:
    options = {"autoscaling_config": QUICK} | options
    deploying.deploy(state, spec(deployment.options(init_args=(str(notes), seconds), **options))).wait(patience(60))


def serving(state: State, name: str = "Loaded") -> int:
    return sum(info.state == SERVING for info in state.observed.replicas(name).values())


def gateways(state: State) -> list[str]:
    wait_until(state.observed.gateways)
    return [info.url for info in state.observed.gateways().values()]


def test_a_burst_brings_replicas_and_quiet_takes_them_away(start_node: StartNode, state: State, notes: Path) -> None:
    start_node("--gateway", "--port", "0")
    deploy(state, notes, seconds=0.05)
    urls = gateways(state)
    wait_until(lambda: serving(state) == 1)
    with Load("Loaded", notes, urls=urls, http=1, handles=0, durable=0) as calm:
        with Load("Loaded", notes, urls=urls, http=4, handles=6, durable=2, pause_s=0.001) as burst:
            wait_until(lambda: serving(state) == 3)
            wait_until(lambda: serve.status()["Loaded"].wanted == 3)
            burst.more()
        wait_until(lambda: serving(state) == 1)
        wait_until(lambda: serve.status()["Loaded"].wanted == 1)
        calm.more(10)
    burst.check(calm)


def test_a_rollout_while_replicas_come_and_go(start_node: StartNode, state: State, notes: Path) -> None:
    start_node("--gateway", "--port", "0")
    deploy(state, notes, Blocking, seconds=0.02)
    with Load("Blocking", notes, urls=gateways(state), http=1, handles=0) as calm:
        with Load("Blocking", notes, handles=8, durable=0) as burst:
            wait_until(lambda: serving(state, "Blocking") > 1)
            deploy(state, notes, Blocking, seconds=0.02)
            deploy(state, notes, Blocking, seconds=0.02, version="1", user_config={"n": 1})
            wait_until(lambda: serving(state, "Blocking") == 3)
        deploy(state, notes, Blocking, seconds=0.02, version="1", user_config={"n": 2})
        wait_until(lambda: serving(state, "Blocking") == 1)
        deploy(state, notes, Blocking, seconds=0.02)
        calm.more(10)
    burst.check(calm)


def test_nodes_share_the_replicas(start_node: StartNode, state: State, notes: Path) -> None:
    nodes = [start_node(wait=False), start_node()]
    bounds = {"min_replicas": 3, "max_replicas": 4}
    deploy(state, notes, seconds=0.05, autoscaling_config=QUICK | bounds)
    with Load("Loaded", notes, handles=1, durable=0) as calm:
        wait_until(lambda: serving(state) == 3)
        nodes[0].terminate()
        assert nodes[0].wait(patience(40)) == 0
        wait_until(lambda: serving(state) == 3)
        calm.more(10)
        with Load("Loaded", notes, handles=12) as burst:
            wait_until(lambda: serving(state) == 4)
        start_node()
        wait_until(lambda: len(state.observed.workers("Loaded")) == 2 and serving(state) == 3)
    burst.check(calm)


def test_what_is_deployed_can_turn_scaling_on_and_off_in_place(
    start_node: StartNode, state: State, notes: Path
) -> None:
    start_node("--exact")
    deploy(state, notes, version="1", autoscaling_config=None, num_replicas=2)
    with Load("Loaded", notes, handles=1, durable=0) as load:
        before = set(state.observed.replicas("Loaded"))
        deploy(state, notes, version="1", autoscaling_config=QUICK | {"min_replicas": 3})
        wait_until(lambda: serving(state) == 3)
        assert before < set(state.observed.replicas("Loaded"))
        deploy(state, notes, version="1", autoscaling_config=None, num_replicas=1)
        wait_until(lambda: serving(state) == 1)
        load.more(10)
    load.check()


def test_a_worker_started_by_hand_takes_bounds_of_its_own(settings: Settings, state: State, notes: Path) -> None:
    celery = [sys.executable, "-m", "celery", "-A", "qserve_workers"]
    worker = subprocess.Popen([*celery, "worker", "-Q", "Loaded", "--autoscale", "4,2", "-n", "scaled@%h"], cwd=ROOT)
    try:
        wait_until(lambda: state.redis.exists(settings.keys.calls("Loaded")) or worker.poll() is None)
        deploy(state, notes, autoscaling_config=None)
        wait_until(lambda: serving(state) == 2)
        asked = [*celery, "control", "autoscale", "3", "3", "--timeout", "5"]
        said = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True, timeout=patience(50))
        assert "autoscale now max=3 min=3" in said.stdout
        wait_until(lambda: serving(state) == 3)
    finally:
        worker.terminate()
        assert worker.wait(patience(40)) == 0
