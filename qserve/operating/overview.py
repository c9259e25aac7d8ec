"""What operators see at a glance: every deployment with its replicas, its queue and its last ten minutes."""

from collections.abc import Sequence
from typing import TypedDict

from qserve.broker.history.buckets import BUCKET_S, Bucket, read_buckets
from qserve.broker.instance.queue_facts import QueueFacts, read_queue_facts
from qserve.broker.instance.state import State, checked, decode_deployed
from qserve.deployments.deploying import condition
from qserve.operating.loads import load_of
from qserve.wire.spec import SERVING, WAITING, Deployed, pause_of

RECENT_S = 600
_RATE_S = 60


class OverviewRow(TypedDict):
    """One deployment.

    `oldest_s` is for how long the first call that nobody has taken has waited, `rate` how many calls ended per second
    in the last minute, `last_seen` when a replica that takes calls was seen last (Unix time), and `spark` how many
    calls ended in each ten seconds of the last ten minutes.
    """

    name: str
    route: str | None
    state: str
    paused: bool
    paused_since: float | None
    paused_by: str
    asleep: bool
    error: str
    version: str | None
    wanted: int
    serving: int
    replicas: int
    queued: int
    running: int
    limit: int
    oldest_s: float
    rate: float
    failed: int
    p50_ms: float | None
    p99_ms: float | None
    last_seen: float | None
    dead: int
    spark: list[int]


def read_overview(state: State, names: Sequence[str]) -> list[OverviewRow]:
    """The rows of these deployments; those that do not exist (any more) are left out.

    Raises:
        BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be asked.
    """
    facts = read_queue_facts(state.redis, state.keys, names)
    now, buckets = read_buckets(state.redis, state.keys, names, RECENT_S)
    nodes = any(not node.drained for node in state.observed.nodes().values())
    rows = []
    for each, recent in zip(facts, buckets, strict=True):
        deployed = deployed_of(state, each)
        if deployed is not None:
            rows.append(_row(deployed, each, recent, now, nodes))
    return rows


def deployed_of(state: State, facts: QueueFacts) -> Deployed | None:
    """What is deployed; None if nothing is, or nothing that a key of ours signed."""
    return checked(lambda: decode_deployed(state.signer, facts.name, facts.meta), f"the spec of {facts.name!r}")


def _row(deployed: Deployed, facts: QueueFacts, recent: Sequence[Bucket], now: float, nodes: bool) -> OverviewRow:
    spec = deployed.spec
    since, who = pause_of(deployed.paused) if deployed.paused else (None, "")
    minute = int(now - _RATE_S) // BUCKET_S
    load = load_of([bucket for bucket in recent if bucket.slot >= minute], _RATE_S)
    first = int(now) // BUCKET_S - RECENT_S // BUCKET_S
    spark = [0] * (RECENT_S // BUCKET_S + 1)
    for bucket in recent:
        if 0 <= bucket.slot - first < len(spark):
            spark[bucket.slot - first] = sum(int(count) for count in bucket.ends[1::2])
    running = sum(replica.running for replica in facts.replicas)
    state, error = condition(deployed, facts.workers)
    return {
        "name": spec.name,
        "route": spec.route_prefix,
        "state": WAITING if not facts.replicas and not nodes else state,
        "paused": bool(deployed.paused),
        "paused_since": since,
        "paused_by": who,
        "asleep": deployed.asleep,
        "error": error,
        "version": spec.version,
        "wanted": sum(worker.wanted for worker in facts.workers),
        "serving": sum(replica.state == SERVING for replica in facts.replicas),
        "replicas": len(facts.replicas),
        "queued": max(0, facts.queued + facts.low - running),
        "running": running,
        "limit": facts.limit,
        "oldest_s": facts.oldest_s,
        "rate": load.rate,
        "failed": load_of(recent, RECENT_S).failed,
        "p50_ms": load.p50_ms,
        "p99_ms": load.p99_ms,
        "last_seen": facts.last_seen,
        "dead": facts.dead,
        "spark": spark,
    }
