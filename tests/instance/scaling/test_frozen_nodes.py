"""A host that was frozen and comes back finds that the others went on without it, and serves nothing old."""

import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from qserve.broker.instance.state import State
from qserve.deployments import deploying
from qserve.settings import Settings
from qserve.wire.spec import SERVING, ReplicaInfo
from tests.instance.scaling.load import Load
from tests.instance.scaling.loaded import Loaded, ran
from tests.support.nodes import StartNode, spec
from tests.support.slowness import patience
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(120)
DEAD_AFTER_S = 2


def everything_of(node: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    process = psutil.Process(node.pid)
    return [process, *process.children(recursive=True)]


def test_a_frozen_node_that_returns_runs_no_call_with_what_was_deployed_before(
    start_node: StartNode, state: State, settings: Settings, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QSERVE_DEAD_AFTER_S", str(DEAD_AFTER_S))
    monkeypatch.setenv("QSERVE_BEAT_INTERVAL_S", "0.3")
    frozen, _other = start_node(wait=False), start_node()
    wait_until(lambda: len(state.observed.nodes()) == 2)
    old = Loaded.options(init_args=(f"{notes}-old", 0.01), idempotent=True)
    deploying.deploy(state, spec(old)).wait(patience(60))
    with Load("Loaded", notes, handles=6, durable=0, pause_s=0.0) as load:
        load.more()
        (gone,) = [id_ for id_, info in state.observed.nodes().items() if info.pid == frozen.pid]
        processes = everything_of(frozen)
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        wait_until(
            lambda: all(info.node != gone for info in state.observed.replicas("Loaded").values())
        )  # it is known as dead
        load.more()
        state.redis.delete(settings.keys.alive(gone))  # which its silence does after 15 s
        deploying.deploy(state, spec(old.options(init_args=(f"{notes}-new", 0.01)))).wait(patience(60))
        load.more()
        before = ran(Path(f"{notes}-old"))
        newest = state.get("Loaded")
        assert newest is not None

        for process in reversed(processes):
            process.send_signal(signal.SIGCONT)
        wait_until(lambda: [r.revision for r in serving(state)] == [newest.spec.revision] * 2)
        load.more()
    assert [each for each in load.ended if each.error] == []
    late = set(ran(Path(f"{notes}-old"))) - set(before)
    assert not late, f"{len(late)} calls were started by the old version after it had been replaced"


def serving(state: State) -> list[ReplicaInfo]:
    return [info for info in state.observed.replicas("Loaded").values() if info.state == SERVING]
