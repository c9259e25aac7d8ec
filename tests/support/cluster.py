"""A real cluster: three primaries, each with a replica, which can be killed, frozen and given other slots."""

import contextlib
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import redis

from qserve.broker.server import embedded
from qserve.broker.server.address import SLOTS
from tests.support.servers import ServerProcess
from tests.support.serving import free_ports
from tests.support.slowness import patience
from tests.support.waiting import wait_until

NODE_TIMEOUT_MS = 1000
PASSWORD = "sesame"
SYNCS = ("--appendfsync", "always")
"""Writes are on the disk before they are answered."""


class ClusterNode(ServerProcess):
    """One server of a cluster."""

    def __init__(
        self, folder: Path, port: int, bus: int, user: Sequence[str], options: Sequence[str], timeout_ms: int
    ) -> None:
        self._timeout_ms = timeout_ms
        self._options = options
        self.folder = folder
        self.port = port
        self.bus = bus
        self.announced = port
        """The port that the cluster tells of it."""
        folder.mkdir()
        everybody = "user default on nopass ~* &* +@all"
        (folder / "users.acl").write_text("\n".join([everybody, *([f"user {' '.join(user)}"] if user else [])]))

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(str(embedded.find_server()), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""),
                *("--cluster-enabled", "yes", "--cluster-port", str(self.bus), "--cluster-config-file", "nodes.conf"),
                *("--cluster-announce-port", str(self.announced), "--cluster-announce-bus-port", str(self.bus)),
                *("--cluster-node-timeout", str(self._timeout_ms), "--cluster-require-full-coverage", "no"),
                *("--maxmemory-policy", "noeviction", "--repl-diskless-sync-delay", "0", "--dir", str(self.folder)),
                *(
                    "--loglevel",
                    "notice",
                    "--logfile",
                    str(self.folder / "log"),
                    "--aclfile",
                    "users.acl",
                    *self._options,
                ),
            ]
        )

    def announce(self, port: int) -> None:
        """Let the cluster tell another port of it, of a proxy before it."""
        self.announced = port
        self.do("CONFIG", "SET", "cluster-announce-port", port)

    def do(self, *command: Any) -> Any:
        """The answer to a command, by this very server."""
        with redis.Redis(port=self.port, protocol=2, socket_timeout=patience(5)) as client:
            return client.execute_command(*command)

    def raw(self, *command: Any) -> Any:
        """Like `do`, without redis-py's ideas of the answer."""
        with redis.Redis(port=self.port, protocol=2, socket_timeout=patience(5)) as client:
            client.response_callbacks.clear()
            return client.execute_command(*command)

    @property
    def id(self) -> str:
        return str(self.do("CLUSTER MYID").decode())

    def facts(self) -> dict[str, str]:
        """What CLUSTER INFO says."""
        answer = self.do("CLUSTER INFO")
        text = answer.decode() if isinstance(answer, bytes) else ""
        lines = [line.partition(":") for line in text.split()]
        return {name: value for name, _, value in lines} or {k: str(v) for k, v in answer.items()}


class Cluster:
    """Its first nodes are the primaries at first, and the others their replicas, in the same order.

    Args:
        user: Name and rules of a user with PASSWORD, in whose name `url` speaks.
        persistent: The servers write down what they are told.
        options: Further arguments of the servers.
        timeout_ms: For how long a node is silent before the others take it for dead.
    """

    def __init__(
        self,
        folder: Path,
        primaries: int = 3,
        *,
        replicas: bool = True,
        user: Sequence[str] = (),
        persistent: bool = False,
        options: Sequence[str] = (),
        timeout_ms: int = NODE_TIMEOUT_MS,
    ) -> None:
        count = primaries * (2 if replicas else 1)
        first = free_ports(2 * count)
        self.size = primaries
        options = [*["--appendonly", "yes"] * persistent, *options]
        self.nodes = [
            ClusterNode(folder / str(i), first + i, first + count + i, user, options, timeout_ms) for i in range(count)
        ]
        login = f"{user[0]}:{PASSWORD}@" if user else ""
        self.url = f"redis+cluster://{login}" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:primaries])

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        for node in self.nodes:
            wait_until(lambda node=node: _answers(node))  # type: ignore[misc]
        for place, node in enumerate(self.nodes[: self.size]):
            first, last = place * SLOTS // self.size, (place + 1) * SLOTS // self.size - 1
            node.do("CLUSTER", "ADDSLOTSRANGE", first, last)
            node.do("CLUSTER", "SET-CONFIG-EPOCH", place + 1)
        for node in self.nodes[1:]:
            self.nodes[0].do("CLUSTER", "MEET", "127.0.0.1", node.port, node.bus)
        everybody = str(len(self.nodes))
        wait_until(lambda: all(node.facts()["cluster_known_nodes"] == everybody for node in self.nodes))
        for place, node in enumerate(self.nodes[self.size :]):
            of = self.nodes[place].id
            wait_until(lambda node=node, of=of: _replicates(node, of))  # type: ignore[misc]
        self.wait_until_whole()

    def wait_until_whole(self) -> None:
        """Wait until every live node finds every slot served, and every replica has what its primary has."""
        live = [node for node in self.nodes if node.process.poll() is None]

        def is_whole() -> bool:
            facts = [node.facts() for node in live]
            if any(each["cluster_state"] != "ok" or each["cluster_slots_ok"] != str(SLOTS) for each in facts):
                return False
            roles = [node.do("ROLE") for node in live]
            return all(role[0] == b"master" or role[3] == b"connected" for role in roles)

        wait_until(is_whole)

    def wait_until_announced(self) -> None:
        """Wait until every node has heard of the ports that the others announce."""
        ports = {node.announced for node in self.nodes[: self.size]}
        wait_until(lambda: all({primary for _, _, primary in _slots(node)} == ports for node in self.nodes))

    def primary_of(self, slot: int) -> ClusterNode:
        """The node that has a slot, as the live ones see it."""
        for node in self.nodes:
            if node.process.poll() is not None:
                continue
            for first, last, primary in _slots(node):
                if first <= slot <= last:
                    return next(each for each in self.nodes if each.announced == primary)
        raise AssertionError(f"nobody has slot {slot}")

    def move(self, slot: int, to: "ClusterNode") -> None:
        """Move a slot while the cluster works, in one step."""
        source = self.primary_of(slot)
        source.do("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", to.id)
        wait_until(lambda: self.primary_of(slot) is to, shows=lambda: source.do("CLUSTER", "GETSLOTMIGRATIONS"))

    def move_key_by_key(self, slot: int, to: "ClusterNode") -> None:
        """Move a slot as servers before Valkey 9 do: for a while some of its keys are here and some there."""
        source = self.primary_of(slot)
        to.do("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        source.do("CLUSTER", "SETSLOT", slot, "MIGRATING", to.id)
        while keys := source.do("CLUSTER", "GETKEYSINSLOT", slot, 5):
            source.do("MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS", *keys)
        to.do("CLUSTER", "SETSLOT", slot, "NODE", to.id)
        source.do("CLUSTER", "SETSLOT", slot, "NODE", to.id)
        wait_until(lambda: self.primary_of(slot) is to)

    def primaries(self) -> list[ClusterNode]:
        """The nodes that have slots."""
        live = next(node for node in self.nodes if node.process.poll() is None)
        ports = {primary for _, _, primary in _slots(live)}
        return [node for node in self.nodes if node.announced in ports]

    def replica_of(self, primary: ClusterNode) -> ClusterNode:
        """A node that follows a primary."""
        live = [node for node in self.nodes if node.process.poll() is None]
        roles = ((node, node.do("ROLE")) for node in live)
        return next(node for node, role in roles if role[0] == b"slave" and int(role[2]) == primary.announced)

    def kill(self) -> None:
        for node in self.nodes:
            with contextlib.suppress(Exception):
                node.kill()


class ClusterAsServer(ServerProcess):
    """All servers of a cluster, to which harm is done at once, as if they were one."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.url = cluster.url

    def start(self) -> None:
        """Start them again, with what they have kept of their data, and of their slots in any case."""
        for node in self.cluster.nodes:
            node.start()
        for node in self.cluster.nodes:
            wait_until(lambda node=node: _answers(node))  # type: ignore[misc]
        self.cluster.wait_until_whole()

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        for node in self.cluster.nodes:
            node.process.wait()

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def signal(self, number: int) -> None:
        for node in self.cluster.nodes:
            node.process.send_signal(number)


def _answers(node: ClusterNode) -> bool:
    with contextlib.suppress(redis.RedisError):
        return bool(node.do("PING"))
    return False


def _replicates(node: ClusterNode, primary: str) -> bool:
    with contextlib.suppress(redis.ResponseError):  # it has not heard of the primary yet
        return bool(node.do("CLUSTER", "REPLICATE", primary))
    return False


def _slots(node: ClusterNode) -> Iterator[tuple[int, int, int]]:
    with redis.Redis(port=node.port, protocol=2, socket_timeout=patience(5)) as client:
        for first, last, primary, *_ in client.execute_command("CLUSTER SLOTS"):
            yield first, last, int(primary[1])
