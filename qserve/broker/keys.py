"""Every Redis key qserve uses, in one file, and in which hash slot it lies.

On one server all keys of a namespace share one slot. On a cluster the state of the instance has a slot, its *home*, and
each deployment lies in one of the other *shards* with everything that belongs to its calls: its queue and records, and
the inboxes of those who call it. So each script touches one slot.
"""

import binascii
import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qserve.broker.server.address import SLOTS, at_slot, slot_of

GROUP = "g"
"""The consumer group through which all replicas of a deployment read its call stream."""


class _Name:
    """A key of which each shard has one."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, keys: "Keys", owner: type["Keys"] | None = None) -> str:
        return keys._key(self._name)


class _HomeName(_Name):
    """A key of which each namespace has one."""

    def __get__(self, keys: "Keys", owner: type["Keys"] | None = None) -> str:
        return keys.at(0)._key(self._name)


class _OfDeployment(_Name):
    """A key of which each deployment has one, in its shard."""

    def __get__(self, keys: "Keys", owner: type["Keys"] | None = None) -> Callable[[str], str]:  # type: ignore[override]
        return lambda deployment: keys.of(deployment)._key(self._name, deployment)


@dataclass(frozen=True)
class Keys:
    """Key names of one namespace, as one of its shards has them.

    Attributes:
        shards: How many there are beside the home; 1 where there is no cluster, and the home is all there is.
        shard: Which of them this is; 0 for the home. Keys of deployments, and of durable calls, lie in their own shards
            whichever this is.
    """

    namespace: str
    shards: int = 1
    shard: int = 0

    deployments = _Name("deployments")
    """Set of deployment names that exist."""
    instance = _Name("instance")
    """String: which history of the desired state this is; a server that has lost it has lost them all."""
    run_id = _Name("run_id")
    """String: run id of the server process that was seen last, where calls are strict."""
    before = _Name("before")
    """Hash: deployment -> the last entry that it had when the server was replaced, where calls are strict."""
    log = _Name("log")
    """Stream of changes of the desired state. Replicas follow that of their shard, gateways and nodes the home's, in
    which all changes are."""
    shard_count = _HomeName("shards")
    """String: how many shards there are, on a cluster."""
    schedules = _HomeName("schedules")
    """Hash: name -> sealed Schedule."""
    paused_schedules = _HomeName("paused_schedules")
    """Hash: name of a schedule that submits nothing -> since when and by whom, as `paused` in a meta hash."""
    fired = _HomeName("fired")
    """Hash: name of a schedule -> what became of its last moment."""
    http_options = _HomeName("http")
    """String: msgpack HttpSettings."""
    nodes = _HomeName("nodes")
    """Hash: node id -> msgpack NodeInfo."""
    drained = _HomeName("drained")
    """Hash: id of a node that is to run nothing -> since when and by whom, as `paused` in a meta hash."""
    gateways = _HomeName("gateways")
    """Hash: gateway id -> msgpack GatewayInfo."""
    counters = _Name("counters")
    """Hash: metric name -> count (rejected frames, late results, ...)."""
    audit = _HomeName("audit")
    """Stream of what operators have done."""
    exporter = _HomeName("exporter")
    """String: id of the gateway that shows the metrics of the whole instance to whoever scrapes all gateways."""
    sampler = _HomeName("sampler")
    """String: which gateway notes how the queues are."""
    celery_prefix = _HomeName("celery:")
    """Prefix of the keys that Celery itself uses, so that no other Celery app meets ours."""

    calls = _OfDeployment("q")
    """Stream of calls waiting or running."""
    dead_letters = _OfDeployment("dead")
    """Stream of calls that were given up on."""
    meta = _OfDeployment("meta")
    """Hash with what ADMIT and the rollout need: gen, spec, max_queued, idempotent, state, error, last_seen."""
    heartbeats = _OfDeployment("hb")
    """Hash: replica id -> counter, or "dead" once its death is known."""
    replicas = _OfDeployment("replicas")
    """Hash: replica id -> msgpack ReplicaInfo."""
    models = _OfDeployment("models")
    """Hash: which of its replicas hold which models, see hold_models.lua."""
    workers = _OfDeployment("workers")
    """Hash: worker id -> msgpack WorkerInfo (what one Celery worker has reached)."""
    due = _OfDeployment("due")
    """Sorted set: durable calls that wait for their time, by when it comes in ms."""
    low = _OfDeployment("low")
    """Sorted set: durable calls of low priority that wait for an empty queue."""
    totals = _OfDeployment("totals")
    """Hash: what has happened to its calls and replicas -> how often; see `qserve.broker.history.totals`."""
    buckets = _OfDeployment("buckets")
    """List of packed counts of ten seconds each, the newest first."""
    troubles = _OfDeployment("troubles")
    """Stream of ordinary calls that failed, were refused or took long, as far as somebody noted them."""
    mover = _OfDeployment("mover")
    """String: which replica moves the calls of these two sets to the queue."""

    @functools.cached_property
    def _tag(self) -> str:
        return _tags(self.namespace, self.shards)[self.shard] if self.shard else self.namespace

    def at(self, shard: int) -> "Keys":
        """Those of a shard."""
        return self if shard == self.shard else _keys(self.namespace, self.shards, shard)

    def of(self, deployment: str) -> "Keys":
        """Those of the shard in which a deployment lies."""
        return self if self.shards == 1 else self.at(binascii.crc32(deployment.encode()) % self.shards + 1)

    def of_call(self, call_id: str) -> "Keys":
        """Those of the shard in which a durable call lies: its id says which."""
        return self if self.shards == 1 else self.at(_shard_in(call_id, self.shards))

    def all(self) -> Iterator["Keys"]:
        """Those of every shard in which deployments lie."""
        return iter((self,)) if self.shards == 1 else map(self.at, range(1, self.shards + 1))

    def address(self, url: str) -> str:
        """The URL of the server that has this shard, from that of the instance."""
        return url if self.shards == 1 else at_slot(url, slot_of(self._tag))

    def _key(self, *parts: str) -> str:
        return ":".join((f"qs:{{{self._tag}}}", *parts))

    def inbox(self, process: str) -> str:
        """Replies and control messages for one process incarnation."""
        return self._key("inbox", process)

    def alive(self, process: str) -> str:
        """Liveness of an inbox's owner; a reply to a dead one is dropped."""
        return self._key("alive", process)

    def payload(self, call_id: str) -> str:
        """A payload too large to stand in the queue."""
        return self.of_call(call_id)._key("p", call_id)

    def transfer(self, name: str, part: str) -> str:
        """A large payload that is being sent: chunk `0`, `1`, ..., and two lists: `ready` and `room`."""
        return self._key("x", name, part)

    def claims(self, process: str, part: int) -> str:
        """String of bits: which calls of a process were run; each part holds 32,768 of them."""
        return self._key("claims", process, str(part))

    def call(self, call_id: str) -> str:
        """Hash: the record of a durable call; also the channel on which its events are announced."""
        return self.of_call(call_id)._key("call", call_id)

    def parts(self, call_id: str) -> str:
        """Stream: what a running durable call has given so far, as "attempt-number", numbered with its events."""
        return self.of_call(call_id)._key("parts", call_id)

    def named(self, idempotency_key: str) -> str:
        """Sorted set: the durable calls that have an idempotency key, by when they were submitted in ms; a shard knows
        those to its own deployments."""
        return self._key("named", hashlib.sha1(idempotency_key.encode(), usedforsecurity=False).hexdigest())

    def index(self, deployment: str, state: str) -> str:
        """Sorted set: the durable calls of a deployment in a state, by when they entered it in ms."""
        return self.of(deployment)._key("index", state, deployment)

    def whole(self, *names: str) -> tuple[str, ...]:
        """Keys for a script that finds further ones in a record.

        On a cluster, one is added that is never there. So the script waits while the slot is being moved key by key: it
        would stop half-way at a key that has gone.
        """
        return names if self.shards == 1 else (*names, self.base)

    @property
    def base(self) -> str:
        """What every key begins with, for scripts that find the keys to use in a record."""
        return self._key("")


@functools.cache
def _keys(namespace: str, shards: int, shard: int) -> Keys:
    return Keys(namespace, shards, shard)


@functools.cache
def _tags(namespace: str, shards: int) -> list[str]:
    """The hash tags of all shards by their numbers.

    Each server of a cluster has slots that follow one another, so the slots of the shards lie evenly over them all.
    """
    found: dict[int, str] = {}
    number = 0
    while len(found) < shards:
        tag = f"{namespace}/{number}"
        found.setdefault(slot_of(tag) * shards // SLOTS + 1, tag)
        number += 1
    return [namespace, *(found[shard] for shard in range(1, shards + 1))]


def _shard_in(call_id: str, shards: int) -> int:
    try:
        return min(int(call_id[1:3], 16), shards)
    except ValueError:  # not the id of a durable call
        return 0
