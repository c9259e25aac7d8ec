"""The observed state: which processes live, what they report, and how many calls wait for them."""

from collections import Counter
from typing import Any

import redis

from qserve.broker.instance.reports import Info, decode_infos
from qserve.broker.keys import Keys
from qserve.broker.redis_errors import CommandRefused, our_errors
from qserve.this_machine import is_running, this_host
from qserve.wire.spec import GatewayInfo, NodeInfo, ReplicaInfo, WorkerInfo


class Observed:
    """The observed state of one namespace. Thread-safe, synchronous.

    Every method raises `BrokerUnavailable` or `ConfigurationError` where Redis cannot be asked.
    """

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._redis = client
        self._keys = keys

    def nodes(self) -> dict[str, NodeInfo]:
        """The live nodes by id."""
        return self._alive(self._infos(self._keys.nodes, NodeInfo))

    def gateways(self) -> dict[str, GatewayInfo]:
        """The live gateways by id."""
        found = self._alive(self._infos(self._keys.gateways, GatewayInfo))
        return {id_: info for id_, info in found.items() if not _gone_from_here(info)}

    def workers(self, name: str) -> dict[str, WorkerInfo]:
        """What each node's Celery worker last reported for a deployment, by node id."""
        return self._infos(self._keys.workers(name), WorkerInfo)

    def replicas(self, name: str) -> dict[str, ReplicaInfo]:
        """The replicas of a deployment by id, without those whose death is known.

        Nobody makes it known where the last machine of a deployment has vanished. There, replicas count that have said
        themselves that they live; elsewhere one may stand still for so long that it says nothing, and is there.
        """
        beats = self._do("HGETALL", self._keys.heartbeats(name))
        gone = {id_.decode() for id_, beat in beats.items() if not beat.isdigit()}
        found = self._infos(self._keys.replicas(name), ReplicaInfo)
        nodes = {id_: info.node for id_, info in found.items() if id_ not in gone}
        living = {node for node in set(nodes.values()) if self.is_alive(node, name)}
        return {id_: found[id_] for id_, node in nodes.items() if node in living or self.is_alive(id_, name)}

    def is_alive(self, process: str, name: str = "") -> bool:
        """Whether a process has said that it lives, within the lifetime of its role; see the module `presence`.

        Args:
            name: Of the deployment, for replicas and workers.
        """
        keys = self._keys.of(name) if name else self._keys
        return bool(self._do("EXISTS", keys.alive(process)))

    def queued(self, name: str) -> int:
        """How many calls of a deployment wait or run."""
        return int(self._do("XLEN", self._keys.calls(name)))

    def demand(self, name: str) -> int:
        """How many calls of a deployment there are to run now.

        Those that wait in its queue or run, and the durable calls beside it that could run if a replica were there:
        those of low priority, and delayed ones whose time has come.
        """
        seconds, _ = self._do("TIME")
        due = self._do("ZCOUNT", self._keys.due(name), "-inf", 1000 * int(seconds))
        return self.queued(name) + int(due) + int(self._do("ZCARD", self._keys.low(name)))

    def waiting(self, name: str) -> tuple[int, float]:
        """How many calls of a deployment no replica has taken, and the seconds for which the first has waited."""
        key = self._keys.calls(name)
        try:
            (group, *_) = self._do("XINFO", "GROUPS", key)
        except (CommandRefused, ValueError):
            return 0, 0.0
        facts = dict(zip(group[::2], group[1::2], strict=True))
        first = self._do("XRANGE", key, b"(" + facts[b"last-delivered-id"], "+", "COUNT", 1)
        if not first:
            return 0, 0.0
        now = self._do("TIME")
        age_s = now[0] + now[1] / 1e6 - int(first[0][0].split(b"-")[0]) / 1000
        return self.queued(name) - int(facts[b"pending"]), max(0.0, age_s)

    def counters(self) -> dict[str, int]:
        """How often rare events have happened in all processes, by name."""
        found: Counter[str] = Counter()
        for keys in {self._keys, *self._keys.all()}:
            found.update({name.decode(): int(count) for name, count in self._do("HGETALL", keys.counters).items()})
        return dict(found)

    def _infos(self, key: str, kind: type[Info]) -> dict[str, Info]:
        return dict(decode_infos(self._do("HGETALL", key), kind))

    def _alive(self, infos: dict[str, Info]) -> dict[str, Info]:
        return {id_: info for id_, info in infos.items() if self.is_alive(id_)}

    def _do(self, *command: Any) -> Any:
        with our_errors(self._redis):
            return self._redis.execute_command(*command)  # type: ignore[no-untyped-call]


def _gone_from_here(gateway: GatewayInfo) -> bool:
    """Whether a gateway of this machine has ended, though its alive key may last a while longer."""
    return gateway.machine != "" and gateway.machine == this_host() and not is_running(gateway.pid)
