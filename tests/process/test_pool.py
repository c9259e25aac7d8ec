"""The Celery worker as a keeper of replicas: real workers, real signals, a real server; the replicas are fakes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from qserve.broker.instance.state import State
from qserve.broker.keys import Keys
from qserve.broker.server import embedded
from qserve.broker.server.redis_clients import client
from qserve.settings import Settings
from qserve.wire.spec import DEPLOY_FAILED, HEALTHY, DeploymentSpec, Target, WorkerInfo
from qserve_workers.celery_app import broker_settings
from tests.support.gates import is_alive
from tests.support.serving import ROOT
from tests.support.slowness import patience
from tests.support.waiting import wait_until

LONG_S = 30.0
"""How long a test waits for what takes a moment on an idle machine."""

Event = dict[str, Any]


class RunningWorker:
    """A `celery worker` process and what its fake replicas do."""

    def __init__(self, folder: Path, settings: Settings, arguments: list[str], environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.settings = settings
        self.state = folder / "state.json"
        self.log = folder / "state.log"
        self.output = folder / "output.txt"
        self.environment = {
            **os.environ,
            "QSERVE_REDIS_URL": settings.redis_url,
            "QSERVE_SECRET": settings.secret,
            "QSERVE_NAMESPACE": settings.namespace,
            "FAKE_REPLICA_STATE": str(self.state),
            "PYTHONPATH": str(ROOT / "tests/support"),
            **environment,
        }
        self.arguments = arguments
        self.log.touch()
        self._generation = 0
        self.deploy(None)

    def start(self) -> "RunningWorker":
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "fake_replica", "worker", *self.arguments],
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return self

    def deploy(self, revision: str | None, **facts: Any) -> int:
        """Make a revision the desired one; None: nothing is deployed."""
        self._generation += revision is not None
        spec = None if revision is None else {"generation": self._generation, "revision": revision, **facts}
        fresh = self.state.with_suffix(".new")
        fresh.write_text(json.dumps(spec))
        fresh.rename(self.state)
        return self._generation

    def ask(self, *command: str) -> str:
        """The answer to a `celery` command."""
        return subprocess.run(
            [sys.executable, "-m", "celery", "-A", "fake_replica", *command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=patience(LONG_S),
        ).stdout

    def events(self, event: str = "", **facts: Any) -> list[Event]:
        found = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [e for e in found if event in ("", e["event"]) and facts.items() <= e.items()]

    def serving(self, revision: str, *, besides: int = 0) -> set[int]:
        """Pids of the live replicas that serve a revision."""
        served = {e["pid"] for e in self.events("state", state="SERVING", revision=revision)}
        return {pid for pid in served - {besides} if is_alive(pid)}

    def born_besides(self, pids: set[int]) -> list[Event]:
        """Births of other replicas."""
        return [e for e in self.events("born") if e["pid"] not in pids]

    def info(self) -> WorkerInfo | None:
        """What the worker tells the world."""
        bodies: Any = []
        with client(self.settings.redis_url, 5.0) as server, contextlib.suppress(redis.ConnectionError):
            bodies = server.hvals(self.settings.keys.of("Echo").workers("Echo"))
        return msgspec.msgpack.decode(bodies[0], type=WorkerInfo) if bodies else None

    def wait_for(self, what: Callable[[], Any], timeout_s: float = LONG_S) -> Any:
        """The first true answer."""
        return wait_until(what, timeout_s, shows=lambda: f"{self.output.read_text()}\n{self.log.read_text()}")

    def wait_until(self, generation: int, state: str = HEALTHY) -> WorkerInfo:
        """The worker's word that it has reached a generation."""

        def reached() -> WorkerInfo | None:
            info = self.info()
            return info if info and info.generation >= generation and info.state == state else None

        found: WorkerInfo = self.wait_for(reached)
        return found

    def end(self) -> None:
        """End it, whatever it does, with everything it started."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        for pid in {e["pid"] for e in self.events()}:
            self.wait_for(partial(is_gone, pid))


def is_gone(pid: int) -> bool:
    return not is_alive(pid)


def open_files(pid: int) -> list[str]:
    """What the file descriptors of a process stand for; it may close some meanwhile."""
    held = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            held.append(str(entry.readlink()))
    return held


StartWorker = Callable[..., RunningWorker]


@pytest.fixture
def start_worker(tmp_path: Path, settings: Settings) -> Iterator[StartWorker]:
    """Starts a worker of Echo with fake replicas; ends it after the test."""
    running: list[RunningWorker] = []

    def start(
        *, concurrency: int = 1, revision: str | None = "a", url: str = "", facts: Mapping[str, Any] = {}, **env: str
    ) -> RunningWorker:
        arguments = ["-Q", "Echo", "--concurrency", str(concurrency)]
        chosen = settings.model_copy(update={"redis_url": url or settings.redis_url})
        worker = RunningWorker(tmp_path, chosen, arguments, env)
        if revision:
            worker.deploy(revision, **facts)
        running.append(worker.start())
        if revision and not facts.get("fail"):
            worker.wait_until(1)
        return worker

    yield start
    for worker in running:
        worker.end()


def test_a_worker_runs_as_many_replicas_as_its_concurrency_and_says_so(start_worker: StartWorker, keys: Keys) -> None:
    worker = start_worker(concurrency=2)
    info = worker.wait_until(1)
    assert (info.ready, info.wanted, info.pid) == (2, 2, worker.process.pid)
    assert len(worker.serving("a")) == 2
    with client(worker.settings.redis_url, 5.0) as server:  # no node speaks for it
        assert info.node == info.id
        assert server.exists(keys.of("Echo").alive(info.id))


def test_under_a_node_the_worker_reports_as_the_nodes_and_follows_num_replicas(start_worker: StartWorker) -> None:
    worker = start_worker(facts={"num_replicas": 2}, QSERVE_NODE="node-1", QSERVE_REPLICAS_EXACT="1")
    assert worker.wait_until(1).node == "node-1"
    assert len(worker.serving("a")) == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "-Q names none"),
        (["-Q", "Echo,Counter"], "-Q names 2: Echo, Counter"),
        (["-Q", "Ec ho"], "'Ec ho' is not a deployment name"),
        (["-Q", "Echo", "--pool", "solo"], "leave out --pool"),
    ],
)
def test_a_worker_refuses_what_it_cannot_serve(
    tmp_path: Path, settings: Settings, arguments: list[str], text: str
) -> None:
    worker = RunningWorker(tmp_path, settings, arguments, {}).start()
    assert worker.process.wait(patience(LONG_S)) == 2
    said = " ".join(worker.output.read_text().split())
    assert text in said
    assert "Traceback" not in said
    if "-Q names" in text:
        assert "qserve start" in said


def test_without_an_instance_the_command_says_so(tmp_path: Path, settings: Settings) -> None:
    nowhere = settings.model_copy(update={"redis_url": ""})
    worker = RunningWorker(tmp_path, nowhere, ["-Q", "Echo"], {}).start()
    assert worker.process.wait(patience(LONG_S)) == 2
    assert "There is no instance running" in worker.output.read_text()


def test_a_killed_replica_is_replaced_at_once_twenty_times_out_of_twenty(
    start_worker: StartWorker, redis_client: "redis.Redis", keys: Keys
) -> None:
    worker = start_worker(concurrency=2)
    delays = []
    for _ in range(20):
        worker.wait_for(lambda: len(worker.serving("a")) == 2)
        before = {e["pid"] for e in worker.events("born")}
        victim = min(worker.serving("a"))
        killed_at = time.time()
        os.kill(victim, signal.SIGKILL)
        [born] = worker.wait_for(partial(worker.born_besides, before))
        delays.append(born["at"] - killed_at)
        buried = worker.wait_for(partial(redis_client.hget, keys.of("Echo").heartbeats("Echo"), f"replica-{victim}"))
        assert buried == b"dead"
    # Without the watch on the process it is up to 5 s, and 2.5 s in the middle.
    assert sorted(delays)[10] < min(patience(0.75), 1.9)
    assert max(delays) < patience(2.5)


def test_a_killed_replica_is_replaced_though_a_child_of_its_own_outlives_it(start_worker: StartWorker) -> None:
    worker = start_worker(facts={"grandchild": True})
    [victim] = worker.serving("a")
    os.kill(victim, signal.SIGKILL)
    worker.wait_for(partial(worker.serving, "a", besides=victim), timeout_s=4)


def test_children_that_end_before_they_come_to_anything_are_replaced_ever_more_slowly(
    start_worker: StartWorker,
) -> None:
    worker = start_worker(revision=None, FAKE_REPLICA_CRASHES="1")
    worker.wait_for(lambda: len(worker.events("born")) >= 5)
    born = [e["at"] for e in worker.events("born")]
    pauses = [later - earlier for earlier, later in pairwise(born)]
    assert pauses[0] >= 0.1
    assert pauses[3] >= 0.8


def test_a_replica_that_cannot_be_forked_costs_no_other_and_is_tried_again(start_worker: StartWorker) -> None:
    node = {"QSERVE_NODE": "node-1", "QSERVE_REPLICAS_EXACT": "1"}
    worker = start_worker(facts={"num_replicas": 1}, FAKE_REPLICA_NO_FORKS="1", **node)
    [first] = worker.serving("a")
    worker.deploy("a", num_replicas=3)
    both = worker.wait_for(lambda: len(found := worker.serving("a")) == 3 and found)
    assert first in both
    assert worker.output.read_text().count("No process can be started for a replica: Resource temporarily") == 2
    assert worker.process.poll() is None


def test_a_replica_forked_later_holds_no_connection_of_its_parent(start_worker: StartWorker) -> None:
    worker = start_worker()
    [victim] = worker.serving("a")
    os.kill(victim, signal.SIGKILL)
    [pid] = worker.wait_for(partial(worker.serving, "a", besides=victim))
    assert not [link for link in open_files(pid) if "socket" in link or "eventpoll" in link]
    assert [link for link in open_files(worker.process.pid) if "socket" in link]


def test_a_redeploy_constructs_first_and_takes_over_after(start_worker: StartWorker) -> None:
    worker = start_worker(facts={"drain_s": 0.3})
    [old] = worker.serving("a")
    worker.wait_until(worker.deploy("b"))
    [new] = worker.serving("b")
    standby = worker.events("state", pid=new, state="STANDBY")[0]["at"]
    draining = worker.events("state", pid=old, state="DRAINING")[0]["at"]
    drained = worker.events("drained", pid=old)[0]["at"]
    serving = worker.events("state", pid=new, state="SERVING")[0]["at"]
    assert standby < draining < drained < serving
    worker.wait_for(partial(is_gone, old))


def test_a_replica_that_left_by_itself_gets_no_tombstone(
    start_worker: StartWorker, redis_client: "redis.Redis", keys: Keys
) -> None:
    worker = start_worker()
    [old] = worker.serving("a")
    worker.wait_until(worker.deploy("b"))
    worker.wait_for(partial(is_gone, old))
    [new] = worker.serving("b")
    os.kill(new, signal.SIGKILL)  # the worker, which deals with ends one by one, has dealt with the other before
    worker.wait_for(lambda: redis_client.hgetall(keys.of("Echo").heartbeats("Echo")))
    assert redis_client.hkeys(keys.of("Echo").heartbeats("Echo")) == [f"replica-{new}".encode()]


def test_a_replica_whose_code_ends_its_process_with_0_has_died_as_any_other(
    start_worker: StartWorker, redis_client: "redis.Redis", keys: Keys
) -> None:
    worker = start_worker()
    [victim] = worker.serving("a")
    worker.deploy("a", exits=victim)
    worker.wait_for(partial(worker.serving, "a", besides=victim))
    buried = worker.wait_for(partial(redis_client.hget, keys.of("Echo").heartbeats("Echo"), f"replica-{victim}"))
    assert buried == b"dead"


def test_a_broken_revision_leaves_the_old_one_serving(start_worker: StartWorker) -> None:
    worker = start_worker()
    [old] = worker.serving("a")
    info = worker.wait_until(worker.deploy("b", fail=True), DEPLOY_FAILED)
    assert "no such model" in info.error
    assert len(worker.events("failed")) == 3
    assert worker.serving("a") == {old}
    worker.wait_until(worker.deploy("a"))  # the roll-back
    assert worker.serving("a") == {old}


def test_a_first_deploy_that_fails_is_reported_and_the_next_one_succeeds(start_worker: StartWorker) -> None:
    worker = start_worker(concurrency=2, facts={"fail": True})
    worker.wait_until(1, DEPLOY_FAILED)
    worker.wait_until(worker.deploy("b"))
    assert len(worker.serving("b")) == 2


def test_an_update_of_the_same_revision_keeps_the_process(start_worker: StartWorker) -> None:
    worker = start_worker()
    [pid] = worker.serving("a")
    worker.wait_until(worker.deploy("a"))
    assert worker.serving("a") == {pid}


def test_a_deleted_deployment_leaves_a_worker_that_waits_for_the_next(start_worker: StartWorker) -> None:
    worker = start_worker()
    [old] = worker.serving("a")
    worker.deploy(None)
    worker.wait_for(lambda: worker.info() is None and not is_alive(old))
    worker.wait_until(worker.deploy("b"))
    assert len(worker.serving("b")) == 1


def test_a_constructor_that_hangs_is_killed(start_worker: StartWorker) -> None:
    worker = start_worker()
    generation = worker.deploy("b", construct_s=60, initialization_timeout=0.2, fail=True)
    worker.wait_for(lambda: (info := worker.info()) and "constructor took over 0.2 s" in info.error)
    assert len(worker.serving("a")) == 1
    worker.wait_until(worker.deploy("c"))
    assert generation == 2


def test_a_replica_that_does_not_leave_is_killed_after_its_grace_period(start_worker: StartWorker) -> None:
    worker = start_worker(facts={"stuck": True, "graceful_timeout": 0.1})
    [old] = worker.serving("a")
    worker.wait_until(worker.deploy("b"))
    worker.wait_for(partial(is_gone, old))
    assert not worker.events("drained", pid=old)


def test_sigterm_drains_and_a_second_one_to_all_does_not_cut_it_short(start_worker: StartWorker) -> None:
    worker = start_worker(concurrency=2, facts={"drain_s": 1.0})
    replicas = worker.serving("a")
    os.killpg(worker.process.pid, signal.SIGTERM)
    worker.wait_for(lambda: len(worker.events("state", state="DRAINING")) >= 2)
    os.killpg(worker.process.pid, signal.SIGTERM)
    assert worker.process.wait(patience(LONG_S)) == 0
    assert {e["pid"] for e in worker.events("drained")} >= replicas
    worker.wait_for(lambda: not any(map(is_alive, replicas)))
    worker.wait_for(lambda: worker.info() is None)


def test_ctrl_c_drains_and_a_second_one_ends_everything_now(
    start_worker: StartWorker, redis_client: "redis.Redis", keys: Keys
) -> None:
    worker = start_worker(facts={"stuck": True, "graceful_timeout": 60})
    [replica] = worker.serving("a")
    worker.process.send_signal(signal.SIGINT)
    worker.wait_for(lambda: worker.events("state", state="DRAINING"))
    worker.process.send_signal(signal.SIGINT)
    worker.process.wait(patience(LONG_S))
    assert "Traceback" not in worker.output.read_text()
    worker.wait_for(partial(is_gone, replica))
    worker.wait_for(lambda: redis_client.hget(keys.of("Echo").heartbeats("Echo"), f"replica-{replica}") == b"dead")


def test_replicas_can_be_listed_stopped_and_drained_with_celery_commands(
    start_worker: StartWorker, redis_client: "redis.Redis"
) -> None:
    worker = start_worker()
    [pid] = worker.serving("a")
    listed = worker.ask("inspect", "replicas")
    for part in (f"'pid': {pid}", f"'replica': 'replica-{pid}'", "'state': 'SERVING'", "'generation': 1", "uptime_s"):
        assert part in listed

    assert "no replica 1 of Echo here" in worker.ask("control", "stop_replica", "1")
    assert f"replica {pid} of Echo drains and leaves" in worker.ask("control", "stop_replica", str(pid))
    worker.wait_for(lambda: len(worker.serving("a")) == 1 and not is_alive(pid))
    assert worker.events("drained", pid=pid)

    assert "of Echo drain, the worker ends" in worker.ask("control", "drain")
    assert worker.process.wait(patience(LONG_S)) == 0
    worker.wait_for(lambda: not worker.serving("a"))
    theirs: Any = redis_client.keys()
    assert [key for key in theirs if not key.startswith(b"qs:{test}:")] == []  # other Celery apps are not met


def test_a_worker_outlives_its_redis_and_looks_after_its_replicas_meanwhile(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    folder = tmp_path / "valkey"
    folder.mkdir()
    valkey = subprocess.Popen(embedded.command(folder))
    try:
        worker = start_worker(url=embedded.redis_url(folder))
        valkey.kill()
        valkey.wait()
        for _ in range(2):
            [victim] = worker.wait_for(lambda: worker.serving("a"))
            os.kill(victim, signal.SIGKILL)
            worker.wait_for(partial(worker.serving, "a", besides=victim))
        valkey = subprocess.Popen(embedded.command(folder))
        reconnected = re.compile(r"(?s)Connected to .*Cannot reach Redis.*Connected to ")
        worker.wait_for(lambda: reconnected.search(worker.output.read_text()))
        worker.wait_until(1)
        worker.wait_until(worker.deploy("b"))
        [victim] = worker.serving("b")
        os.kill(victim, signal.SIGKILL)
        worker.wait_for(lambda: worker.serving("b") - {victim})
        assert "'state': 'SERVING'" in worker.wait_for(lambda: worker.ask("inspect", "replicas"))
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(patience(LONG_S)) == 0
    finally:
        valkey.kill()
        valkey.wait()


def test_a_worker_whose_redis_is_away_can_be_stopped(start_worker: StartWorker, tmp_path: Path) -> None:
    folder = tmp_path / "valkey"
    folder.mkdir()
    valkey = subprocess.Popen(embedded.command(folder))
    try:
        worker = start_worker(url=embedded.redis_url(folder))
    finally:
        valkey.kill()
        valkey.wait()
    worker.wait_for(lambda: "Cannot reach Redis" in worker.output.read_text())
    [replica] = worker.serving("a")
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(patience(LONG_S)) == 0
    assert worker.events("drained", pid=replica)
    assert "Traceback" not in worker.output.read_text()


def test_a_real_replica_lives_in_the_pool(tmp_path: Path, settings: Settings, state: State) -> None:
    (tmp_path / "pool_user_code.py").write_text("class Echo:\n    def __call__(self, x):\n        return x\n")
    target = Target(import_path="pool_user_code:Echo", sys_path=(str(tmp_path),))
    state.deploy(DeploymentSpec(name="Echo", target=target, revision="r"), expected=0)
    worker = RunningWorker(tmp_path, settings, ["-Q", "Echo"], {})
    environment = {k: v for k, v in worker.environment.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-m", "qserve_workers", "-Q", "Echo"]
    with worker.output.open("wb") as output:
        worker.process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output)
    try:
        worker.wait_until(1)
        [replica] = state.observed.replicas("Echo").values()
        os.kill(replica.pid, signal.SIGKILL)
        worker.wait_for(lambda: any(r.pid != replica.pid for r in state.observed.replicas("Echo").values()))
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(patience(LONG_S)) == 0
    finally:
        worker.end()


@pytest.mark.parametrize(
    ("url", "celerys"),
    [
        ("redis://:pw@host:6380/3", "redis://:pw@host:6380/3"),
        ("redis://u%40:p%2Fw@host?db=2", "redis://u%40:p%2Fw@host:6379/2"),
        ("unix:///tmp/x.sock", "redis+socket:///tmp/x.sock?virtual_host=0"),
        ("unix://:pw@/tmp/x.sock?db=1", "redis+socket://:pw@/tmp/x.sock?virtual_host=1"),
        ("rediss://host/0", "redis://host:6379/0"),
        ("redis+sentinel://:pw@a,b:1/main/4", "sentinel://:pw@a:26379/4;sentinel://:pw@b:1/4"),
    ],
)
def test_redis_urls_in_celerys_spelling(url: str, celerys: str) -> None:
    spelt = broker_settings(url)
    assert spelt["broker_url"] == celerys
    assert bool(spelt["broker_use_ssl"]) == url.startswith("rediss")
