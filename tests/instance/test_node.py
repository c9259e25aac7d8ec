"""A node keeps running what the state says, and leaves nothing behind."""

import asyncio
import json
import os
import signal
import socket
import urllib.request
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner

from qserve.broker.instance.state import State
from qserve.broker.keys import Keys
from qserve.cli.command_line import main
from qserve.deployments import deploying
from qserve.settings import Settings
from qserve.wire.spec import SERVING, WAITING
from qserve_workers.children import program
from qserve_workers.node_options import parse
from qserve_workers.supervise import KeptProcess
from tests.support.deployed import Broken, OtherPid, Pid
from tests.support.gates import is_alive
from tests.support.nodes import StartNode, spec, start_node, workers_of
from tests.support.slowness import patience
from tests.support.waiting import until, wait_until

__all__ = ["start_node"]


def test_a_node_that_starts_forgets_nodes_and_gateways_that_were_killed(
    start_node: StartNode, redis_client: "redis.Redis", keys: Keys
) -> None:
    """Else what each of them has said would stay for ever, and be gone through whenever somebody asks who is there."""
    for name in (keys.nodes, keys.gateways):
        redis_client.hset(name, mapping={"killed": b"what it has said", "alive": b"what it says"})
    redis_client.set(keys.alive("alive"), 1)
    start_node()
    wait_until(lambda: redis_client.hkeys(keys.gateways) == [b"alive"])
    assert not redis_client.hexists(keys.nodes, "killed")
    assert redis_client.hexists(keys.nodes, "alive")


class TestWorkers:
    def test_one_celery_worker_per_deployment_and_redeploys_touch_only_their_own(
        self, start_node: StartNode, state: State
    ) -> None:
        node = start_node()
        for deployment in (Pid, OtherPid):
            deploying.deploy(state, spec(deployment)).wait()
        workers = {worker.pid for worker in workers_of(node)}
        replicas = {name: {info.pid for info in state.observed.replicas(name).values()} for name in ("Pid", "OtherPid")}

        deploying.deploy(state, spec(Pid)).wait()

        assert len(workers) == 2
        assert {worker.pid for worker in workers_of(node)} == workers
        assert {info.pid for info in state.observed.replicas("OtherPid").values()} == replicas["OtherPid"]
        assert not {info.pid for info in state.observed.replicas("Pid").values()} & replicas["Pid"]

    def test_a_worker_that_was_killed_is_started_again(self, start_node: StartNode, state: State) -> None:
        node = start_node()
        deploying.deploy(state, spec(Pid)).wait()
        (worker,) = workers_of(node)
        old = {info.pid for info in state.observed.replicas("Pid").values()}

        worker.kill()

        wait_until(
            lambda: {info.pid for info in state.observed.replicas("Pid").values() if info.state == "SERVING"} - old
        )

    def test_the_node_tells_of_replicas_that_died_with_their_worker(
        self,
        start_node: StartNode,
        state: State,
        keys: Keys,
        redis_client: "redis.Redis",
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Nobody has to wait for the silence of their heartbeats before their calls are taken over."""
        monkeypatch.setenv("QSERVE_DEAD_AFTER_S", str(patience(100)))
        node = start_node()
        deploying.deploy(state, spec(Pid)).wait()
        (old,) = state.observed.replicas("Pid")
        (worker,) = workers_of(node)

        worker.kill()

        wait_until(lambda: not redis_client.hexists(keys.heartbeats("Pid"), old))

    def test_replicas_per_node_is_the_number_here_whatever_the_deployment_says(
        self, start_node: StartNode, state: State
    ) -> None:
        start_node("--replicas-per-node", "2")

        deploying.deploy(state, spec(Pid.options(num_replicas=5))).wait()

        assert len(state.observed.replicas("Pid")) == 2

    def test_only_restricts_what_a_node_serves_and_what_deploy_waits_for(
        self, start_node: StartNode, state: State
    ) -> None:
        node = start_node("--only", "OtherPid")
        deploying.deploy(state, spec(Pid)).wait()
        deploying.deploy(state, spec(OtherPid)).wait()

        assert len(workers_of(node)) == 1
        assert state.list()["Pid"].state == "WAITING"
        assert state.list()["OtherPid"].state == "HEALTHY"

    def test_a_deployment_that_waited_starts_with_its_first_node(self, start_node: StartNode, state: State) -> None:
        deploying.deploy(state, spec(Pid)).wait()
        deploying.deploy(state, spec(Broken)).wait()

        start_node()

        wait_until(lambda: state.list()["Pid"].state == "HEALTHY")
        wait_until(lambda: state.list()["Broken"].state == "DEPLOY_FAILED")
        assert "no model to load" in state.list()["Broken"].error

    def test_a_failed_deployment_refuses_calls(
        self, start_node: StartNode, state: State, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        deploying.deploy(state, spec(Broken)).wait()
        start_node()

        wait_until(lambda: redis_client.hget(keys.meta("Broken"), "refuse"))

    def test_two_nodes_both_serve_and_delete_waits_for_both(self, start_node: StartNode, state: State) -> None:
        start_node()
        start_node()
        deploying.deploy(state, spec(Pid)).wait()
        pids = [info.pid for info in state.observed.replicas("Pid").values()]

        deploying.delete(state, "Pid")

        assert len(pids) == 2
        wait_until(lambda: not any(map(is_alive, pids)))


class TestGateway:
    def test_a_killed_gateway_comes_back_on_its_port_and_serves_what_was_deployed_meanwhile(
        self, start_node: StartNode, state: State
    ) -> None:
        start_node("--gateway", "--port", "0")
        wait_until(state.observed.gateways)
        deploying.deploy(state, spec(Pid)).wait()
        (gateway,) = state.observed.gateways().values()
        url = gateway.url

        os.kill(gateway.pid, signal.SIGKILL)
        deploying.deploy(state, spec(OtherPid)).wait()

        wait_until(lambda: any(info.pid != gateway.pid for info in state.observed.gateways().values()))
        with urllib.request.urlopen(f"{url}/OtherPid", timeout=patience(20)) as response:
            assert int(response.read()) < 0


class TestStopping:
    def test_a_second_signal_does_not_wait_for_calls(self, start_node: StartNode, state: State) -> None:
        node = start_node()
        deploying.deploy(state, spec(Pid)).wait()

        node.terminate()
        wait_until(lambda: not state.observed.nodes())
        node.terminate()

        assert node.wait(patience(10)) == 0


class TestKeepingAProcess:
    async def test_it_is_started_again_when_it_ends(self, tmp_path: Path) -> None:
        log = tmp_path / "runs"
        kept = KeptProcess("script", program(lambda: ["sh", "-c", f"echo run >> {log}"], os.environ))

        kept.start()
        await until(lambda: log.exists() and len(log.read_text().splitlines()) >= 3)
        await kept.stop(1, asyncio.Event())

        assert kept.ended.is_set()
        assert kept.pid is None

    async def test_one_that_ignores_sigterm_is_killed_when_its_time_is_up(self, tmp_path: Path) -> None:
        ready = tmp_path / "ready"
        script = f"trap '' TERM; touch {ready}; while :; do sleep 0.05; done"
        kept = KeptProcess("script", program(lambda: ["sh", "-c", script], os.environ))
        kept.start()
        pid = await until(lambda: kept.pid)
        await until(ready.exists)

        await kept.stop(0.2, asyncio.Event())

        await until(lambda: not is_alive(pid))


def test_the_command_line_of_qserve_start_is_understood() -> None:
    options = parse(["--only", "A, B", "--gateway", "--host", "0.0.0.0", "--port", "80"])

    assert options.only == ("A", "B")
    assert (options.gateway, options.host, options.port, options.replicas_per_node) == (True, "0.0.0.0", 80, 1)
    assert parse(["--exact"]).replicas_per_node is None


class TestDrained:
    def test_a_drained_node_runs_nothing_until_it_is_told_to(
        self, start_node: StartNode, state: State, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("redis_url", "secret", "namespace"):
            monkeypatch.setenv(f"QSERVE_{name.upper()}", getattr(settings, name))
        one, two = start_node(), start_node()
        host = socket.gethostname()
        deploying.deploy(state, spec(Pid)).wait()
        assert len(state.observed.replicas("Pid")) == 2

        several = CliRunner().invoke(main, ["drain", host])
        assert f"name one of {host}:" in several.output
        drained = CliRunner().invoke(main, ["drain", f"{host}:{one.pid}", "--json"])

        assert drained.exit_code == 0, drained.output
        assert json.loads(drained.stdout) == {"node": f"{host}:{one.pid}", "drained": True}
        wait_until(lambda: workers_of(one) == [])
        (left,) = state.observed.replicas("Pid").values()
        assert left.node == next(node.id for node in state.observed.nodes().values() if node.pid == two.pid)
        deploying.deploy(state, spec(OtherPid)).wait()  # does not wait for a node that is drained
        assert len(state.observed.replicas("OtherPid")) == 1
        shown = json.loads(CliRunner().invoke(main, ["status", "--json"]).stdout)["nodes"]
        assert {node["pid"]: node["drained"] for node in shown} == {one.pid: True, two.pid: False}
        assert "No other node serves OtherPid, Pid" in CliRunner().invoke(main, ["drain", f"{host}:{two.pid}"]).output
        shown = json.loads(CliRunner().invoke(main, ["status", "--json"]).stdout)["deployments"]
        assert [(row["name"], row["state"]) for row in shown] == [("OtherPid", WAITING), ("Pid", WAITING)]

        for node in (one, two):
            assert CliRunner().invoke(main, ["drain", f"{host}:{node.pid}", "--undo"]).exit_code == 0
        wait_until(lambda: sum(info.state == SERVING for info in state.observed.replicas("Pid").values()) == 2)
