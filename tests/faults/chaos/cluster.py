"""An instance of real processes that can be hurt: a server, nodes with their workers and replicas, and gateways.

Roles name the processes: "server", "node-0", "node-1", ..., "gateway-0", ..., "client" (the load). A role may have
environment variables of its own, and so a Redis URL of its own, which may lead through a proxy.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import psutil

from qserve.broker.instance.state import State
from qserve.broker.server import embedded
from qserve.calls import process_client
from qserve.deployments.deploying import Goal
from qserve.deployments.driver import ConnectedInstance
from qserve.settings import Settings
from tests.faults.chaos import app
from tests.faults.failover.sentinels import Failover
from tests.support import cluster as redis_cluster
from tests.support.serving import ROOT, free_port
from tests.support.waiting import wait_until

_MARK = "QSERVE_CHAOS_CLUSTER"
_START_S = 60.0
_SHARD_TIMEOUT_MS = 3000
"""A busy machine can keep a server from running for a second; that is not to count as its death."""


@dataclass(frozen=True)
class Setup:
    """What a cluster consists of.

    Attributes:
        nodes: Machines, each with one worker per deployment.
        replicas: Of each deployment on each node.
        persistent: The server writes down what it is told (`appendonly yes`).
        environment: Variables by role, of all processes of qserve under "".
        server: More arguments for the server.
        sentinels: Instead of one server a primary and a replica, watched by three sentinels.
        shards: Instead of one server a Redis cluster of three primaries and their replicas.
    """

    nodes: int = 2
    replicas: int = 2
    gateways: int = 2
    persistent: bool = True
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    server: tuple[str, ...] = ()
    sentinels: bool = False
    shards: bool = False


class Server:
    """The Valkey of a cluster."""

    def __init__(self, folder: Path, setup: Setup, environment: Mapping[str, str]) -> None:
        self.url = embedded.redis_url(folder)
        self._folder = folder
        self._environment = environment
        self._command = [*embedded.command(folder), "--appendonly", "yes" if setup.persistent else "no", *setup.server]

    def start(self) -> None:
        """Start it, again perhaps, and wait until it answers."""
        self.process = subprocess.Popen(self._command, env={**os.environ, **self._environment})
        wait_until(self._answers, _START_S, shows=(self._folder / "valkey.log").read_text)

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self._folder / "valkey.log").read_text()
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(embedded.socket_path(self._folder)))
            probe.settimeout(1)
            probe.sendall(b"PING\r\n")
            return probe.recv(64).startswith(b"+PONG")
        return False

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.kill()
        self.process.wait()


class Cluster:
    """One instance, from `start` to `stop`. While it runs, `serve` and handles of this process use it."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.folder = Path(tempfile.mkdtemp(prefix="qs-"))
        self.ledgers = self.folder / "ledgers"
        self.ledgers.mkdir()
        self._mark = f"{os.getpid()}-{secrets.token_hex(8)}"
        self.environment: dict[str, dict[str, str]] = {role: dict(own) for role, own in setup.environment.items()}
        self.failover = Failover(self.folder) if setup.sentinels else None
        self.shards = _shards(self.folder, setup) if setup.shards else None
        environment = {_MARK: self._mark, **self.environment.get("server", {})}
        self.server = (
            redis_cluster.ClusterAsServer(self.shards) if self.shards else Server(self.folder, setup, environment)
        )
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.gateways: list[subprocess.Popen[bytes]] = []
        self.gateway_urls = [f"http://127.0.0.1:{free_port()}" for _ in range(setup.gateways)]
        self.calls_before_load = 0
        """How many calls each deployment was sent that are none of the load."""
        self._kept = dict(os.environ)

    # Life cycle

    def start_server(self) -> None:
        """Start the server alone, and point this process to it; a proxy may be put before it then."""
        broker = self.failover or self.shards or self.server
        broker.start()
        for name in [name for name in os.environ if name.startswith("QSERVE_")]:
            del os.environ[name]
        os.environ |= {
            "QSERVE_REDIS_URL": broker.url,
            "QSERVE_SECRET": secrets.token_hex(16),
            "QSERVE_RUNTIME_DIR": str(self.folder),
            "QSERVE_LOG_LEVEL": "INFO",
            app.LEDGERS: str(self.ledgers),
            _MARK: self._mark,
        }
        settings = Settings()
        self.keys = settings.keys
        self.instance = ConnectedInstance(settings)
        self.state: State = self.instance.state
        self.redis = self.state.redis

    def start(self) -> None:
        """Start everything else, deploy, and wait until every replica serves and every gateway knows."""
        for number in range(self.setup.nodes):
            self.start_node(number)
        for number in range(self.setup.gateways):
            self.start_gateway(number)
        for number in range(self.setup.gateways):
            self.wait_for_gateway(number)
        self._wait("every node is there", lambda: len(self.state.observed.nodes()) == self.setup.nodes)
        goals = [self.put(name, "1") for name in ("Safe", "Once")]
        for goal in goals:
            assert goal.wait(_START_S), self.logs()

    def stop(self) -> None:
        """End every process of it, at once, and remove what it wrote."""
        process_client.close_current_client()
        (self.failover or self.shards or self.server).kill()
        for gone in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                gone.kill()
        for each in (*self.nodes, *self.gateways):
            each.wait(20)
        self.state.close()
        os.environ.clear()
        os.environ |= self._kept
        shutil.rmtree(self.folder, ignore_errors=True)

    def environment_of(self, role: str) -> dict[str, str]:
        """The environment of a process in a role."""
        return {**os.environ, **self.environment.get("", {}), **self.environment.get(role, {})}

    def spawn(self, role: str, *arguments: str) -> "subprocess.Popen[bytes]":
        """Start `python -m ARGUMENTS` in a role; what it says goes to its log."""
        with (self.folder / f"{role}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                env=self.environment_of(role),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def start_node(self, number: int) -> None:
        """Start a node, again perhaps."""
        node = self.spawn(f"node-{number}", "qserve.cli", "start", "--replicas-per-node", str(self.setup.replicas))
        self.nodes[number : number + 1] = [node]

    def start_gateway(self, number: int) -> None:
        """Start a gateway on its port, again perhaps."""
        port = self.gateway_urls[number].rpartition(":")[2]
        self.gateways[number : number + 1] = [self.spawn(f"gateway-{number}", "qserve_gateway", "--port", port)]

    def put(self, name: str, version: str, *, broken: bool = False) -> Goal:
        """Deploy a version of "Safe" or "Once" without waiting for it."""
        deployment = {"Safe": app.Safe, "Once": app.Once}[name].options(version=version)
        arguments = {"version": version, "broken": broken}
        return self.instance.put(deployment.to_spec(self.instance.codec, init_kwargs=arguments))

    # Its processes

    def replicas(self, node: int | None = None) -> list[psutil.Process]:
        """The replicas of a node, or of all, found among the processes and not asked of Redis."""
        nodes = self.nodes if node is None else [self.nodes[node]]
        found: list[psutil.Process] = []
        for each in nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for worker in psutil.Process(each.pid).children():
                    found += worker.children()
        return found

    def tree(self, pid: int) -> list[psutil.Process]:
        """A process and all that it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(pid)
            return [top, *top.children(recursive=True)]
        return []

    def processes(self) -> Iterator[psutil.Process]:
        """Every process of this cluster that lives, also those whose parent is gone."""
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if each.pid != os.getpid() and each.environ().get(_MARK) == self._mark:
                    yield each

    def stored(self) -> set[str]:
        """The keys in Redis, but for what comes with a first message or mishap: inboxes of those who live, counts."""
        if self.shards is not None:
            found = {key.decode() for node in self.shards.primaries() for key in node.do("KEYS", "*")}
        else:
            found = {key.decode() for key in cast("list[bytes]", list(self.redis.scan_iter(count=1000)))}
        gone = set()
        for keys in {self.keys, *self.keys.all()}:
            owners = {key.removeprefix(keys.inbox("")) for key in found if key.startswith(keys.inbox(""))}
            gone |= {keys.inbox(owner) for owner in owners if keys.alive(owner) in found} | {keys.counters}
        for name in ("Safe", "Once"):
            gone |= {self.keys.buckets(name), self.keys.troubles(name)}
        return found - gone

    def logs(self) -> str:
        """The end of what every process has said."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    # Waiting

    def wait_until_served(self, timeout_s: float = _START_S) -> None:
        """Until every deployment has all its replicas again."""
        wanted = self.setup.nodes * self.setup.replicas
        for name in ("Safe", "Once"):
            self._wait(f"all replicas of {name} serve", lambda name=name: self._serving(name) == wanted, timeout_s)  # type: ignore[misc]

    def wait_for_gateway(self, number: int) -> None:
        """Until a gateway answers."""
        url = f"{self.gateway_urls[number]}/-/healthz"

        def answers() -> bool:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url, timeout=5).close()
                return True
            return False

        self._wait(f"{url} answers", answers)

    def meet_shards(self) -> None:
        """Let every gateway call every deployment, so that it says in their shards that it lives; the calls fail."""
        for url in self.gateway_urls:
            self.calls_before_load += 1
            for name in ("Safe", "Once"):
                with contextlib.suppress(urllib.error.HTTPError):
                    urllib.request.urlopen(f"{url}/{name}", timeout=_START_S)

    def _serving(self, name: str) -> int:
        infos = self.state.observed.replicas(
            name
        ).values()  # those lost with their node are in it until that is noticed
        return sum(each.state == "SERVING" and psutil.pid_exists(each.pid) for each in infos)

    def _wait(self, what: str, condition: Callable[[], bool], timeout_s: float = _START_S) -> None:
        wait_until(condition, timeout_s, shows=lambda: f"waited until {what}\n{self.logs()}")


def _shards(folder: Path, setup: Setup) -> redis_cluster.Cluster:
    return redis_cluster.Cluster(
        folder, persistent=setup.persistent, options=setup.server, timeout_ms=_SHARD_TIMEOUT_MS
    )


def end_everything() -> None:
    """End every process of every cluster that this process has started."""
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if each.pid != os.getpid() and each.environ().get(_MARK, "").startswith(f"{os.getpid()}-"):
                each.kill()


def kill_at_once(processes: Iterable[psutil.Process]) -> list[int]:
    """End processes as a power failure does: none has time to notice that another one is gone."""
    pids: list[int] = []
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for each in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(number)
                pids.append(each.pid)
    return sorted(set(pids))
