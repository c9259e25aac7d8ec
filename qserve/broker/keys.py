"""Every Redis key qserve uses, in one file; all of a namespace's keys share one hash slot."""

import hashlib
from dataclasses import dataclass

GROUP = "g"
"""The consumer group through which all replicas of a deployment read its call stream."""


class _Name:
    """A key of which each namespace has one."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, keys: "Keys", owner: type["Keys"] | None = None) -> str:
        return keys._key(self._name)


@dataclass(frozen=True)
class Keys:
    """Key names of one namespace."""

    namespace: str

    deployments = _Name("deployments")
    """Set of deployment names that exist."""
    instance = _Name("instance")
    """String: which history of the desired state this is; a server that has lost it has lost them all."""
    run_id = _Name("run_id")
    """String: run id of the server process that was seen last, where calls are strict."""
    before = _Name("before")
    """Hash: deployment -> the last entry that it had when the server was replaced, where calls are strict."""
    log = _Name("log")
    """Stream of changes of the desired state; gateways, nodes and replicas follow it."""
    schedules = _Name("schedules")
    """Hash: name -> sealed Schedule."""
    paused_schedules = _Name("paused_schedules")
    """Hash: name of a schedule that submits nothing -> since when and by whom, as `paused` in a meta hash."""
    fired = _Name("fired")
    """Hash: name of a schedule -> what became of its last moment."""
    http_options = _Name("http")
    """String: msgpack HttpSettings."""
    nodes = _Name("nodes")
    """Hash: node id -> msgpack NodeInfo."""
    drained = _Name("drained")
    """Hash: id of a node that is to run nothing -> since when and by whom, as `paused` in a meta hash."""
    gateways = _Name("gateways")
    """Hash: gateway id -> msgpack GatewayInfo."""
    counters = _Name("counters")
    """Hash: metric name -> count (rejected frames, late results, ...)."""
    audit = _Name("audit")
    """Stream of what operators have done."""
    exporter = _Name("exporter")
    """String: id of the gateway that shows the metrics of the whole instance to whoever scrapes all gateways."""
    sampler = _Name("sampler")
    """String: which gateway notes how the queues are."""
    celery_prefix = _Name("celery:")
    """Prefix of the keys that Celery itself uses, so that no other Celery app meets ours."""

    def _key(self, *parts: str) -> str:
        return ":".join((f"qs:{{{self.namespace}}}", *parts))

    def calls(self, deployment: str) -> str:
        """Stream of calls waiting or running."""
        return self._key("q", deployment)

    def dead_letters(self, deployment: str) -> str:
        """Stream of calls that were given up on."""
        return self._key("dead", deployment)

    def meta(self, deployment: str) -> str:
        """Hash with what ADMIT and the rollout need: gen, spec, max_queued, idempotent, state, error, last_seen."""
        return self._key("meta", deployment)

    def heartbeats(self, deployment: str) -> str:
        """Hash: replica id -> counter, or "dead" once its death is known."""
        return self._key("hb", deployment)

    def replicas(self, deployment: str) -> str:
        """Hash: replica id -> msgpack ReplicaInfo."""
        return self._key("replicas", deployment)

    def models(self, deployment: str) -> str:
        """Hash: which of its replicas hold which models, see hold_models.lua."""
        return self._key("models", deployment)

    def workers(self, deployment: str) -> str:
        """Hash: worker id -> msgpack WorkerInfo (what one Celery worker has reached)."""
        return self._key("workers", deployment)

    def inbox(self, process: str) -> str:
        """Replies and control messages for one process incarnation."""
        return self._key("inbox", process)

    def alive(self, process: str) -> str:
        """Liveness of an inbox's owner; a reply to a dead one is dropped."""
        return self._key("alive", process)

    def payload(self, call_id: str) -> str:
        """A payload too large to stand in the queue."""
        return self._key("p", call_id)

    def transfer(self, name: str, part: str) -> str:
        """A large payload that is being sent: chunk `0`, `1`, ..., and two lists: `ready` and `room`."""
        return self._key("x", name, part)

    def claims(self, process: str, part: int) -> str:
        """String of bits: which calls of a process were run; each part holds 32,768 of them."""
        return self._key("claims", process, str(part))

    def call(self, call_id: str) -> str:
        """Hash: the record of a durable call; also the channel on which its events are announced."""
        return self._key("call", call_id)

    def parts(self, call_id: str) -> str:
        """Stream: what a running durable call has given so far, as "attempt-number", numbered with its events."""
        return self._key("parts", call_id)

    def named(self, idempotency_key: str) -> str:
        """Sorted set: the durable calls that have an idempotency key, by when they were submitted in ms."""
        return self._key("named", hashlib.sha1(idempotency_key.encode(), usedforsecurity=False).hexdigest())

    def due(self, deployment: str) -> str:
        """Sorted set: durable calls that wait for their time, by when it comes in ms."""
        return self._key("due", deployment)

    def low(self, deployment: str) -> str:
        """Sorted set: durable calls of low priority that wait for an empty queue."""
        return self._key("low", deployment)

    def index(self, deployment: str, state: str) -> str:
        """Sorted set: the durable calls of a deployment in a state, by when they entered it in ms."""
        return self._key("index", state, deployment)

    def totals(self, deployment: str) -> str:
        """Hash: what has happened to its calls and replicas -> how often; see `qserve.broker.history.totals`."""
        return self._key("totals", deployment)

    def buckets(self, deployment: str) -> str:
        """List of packed counts of ten seconds each, the newest first."""
        return self._key("buckets", deployment)

    def troubles(self, deployment: str) -> str:
        """Stream of ordinary calls that failed, were refused or took long, as far as somebody noted them."""
        return self._key("troubles", deployment)

    def mover(self, deployment: str) -> str:
        """String: which replica moves the calls of these two sets to the queue."""
        return self._key("mover", deployment)

    @property
    def base(self) -> str:
        """What every key begins with, for scripts that find the keys to use in a record."""
        return self._key("")
