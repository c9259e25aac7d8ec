"""How deployments and their queues are now: for many of them in two round trips, whatever is queued."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import redis

from qserve.broker.instance.reports import decode_infos
from qserve.broker.instance.state import META_FIELDS
from qserve.broker.keys import GROUP, Keys
from qserve.broker.redis_errors import our_errors
from qserve.wire.spec import ReplicaInfo, WorkerInfo

_REPLIES = 10


class QueueFacts(NamedTuple):
    """One deployment and its queue.

    Attributes:
        meta: What `decode_deployed` takes.
        limit: The bound of the queue; 0 if it is not known.
        last_seen: Unix time at which a replica that takes calls said so last; None if none ever has.
        queued: Calls that wait or run.
        waiting: Calls in the queue that no replica has taken.
        due, low: Durable calls that wait for their time, and for an empty queue.
        oldest_s: For how long the first that nobody has taken has waited.
    """

    name: str
    meta: list[bytes | None]
    limit: int
    last_seen: float | None
    queued: int
    waiting: int
    due: int
    low: int
    dead: int
    oldest_s: float
    replicas: tuple[ReplicaInfo, ...]
    workers: tuple[WorkerInfo, ...]


def read_queue_facts(client: redis.Redis, keys: Keys, names: Sequence[str]) -> list[QueueFacts]:
    """How these deployments are now.

    Raises:
        BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be asked.
    """
    pipeline = client.pipeline(transaction=False)
    pipeline.time()
    for name in names:
        pipeline.hmget(keys.meta(name), *META_FIELDS, "max_queued", "last_seen")
        pipeline.xlen(keys.calls(name))
        pipeline.xlen(keys.dead_letters(name))
        pipeline.zcard(keys.due(name))
        pipeline.zcard(keys.low(name))
        pipeline.hgetall(keys.heartbeats(name))
        pipeline.hgetall(keys.replicas(name))
        pipeline.hgetall(keys.workers(name))
        pipeline.exists(keys.calls(name))
    with our_errors(client):
        (seconds, micros), *answers = cast("Any", pipeline.execute())
        per = _REPLIES - 1
        found = [answers[place : place + per] for place in range(0, len(answers), per)]
        groups = _groups(client, keys, [name for name, facts in zip(names, found, strict=True) if facts[-1]])
        first = _first_waiting(client, keys, groups)
    now = seconds + micros / 1e6
    return [_facts(name, facts, now, groups, first) for name, facts in zip(names, found, strict=True)]


def _groups(client: redis.Redis, keys: Keys, names: Sequence[str]) -> dict[str, tuple[int, bytes]]:
    pipeline = client.pipeline(transaction=False)
    for name in names:
        pipeline.xinfo_groups(keys.calls(name))
    found = {}
    for name, groups in zip(names, cast("Any", pipeline.execute()) if names else [], strict=True):
        for group in groups:
            if group["name"] == GROUP.encode():
                found[name] = (int(group["pending"]), bytes(group["last-delivered-id"]))
    return found


def _first_waiting(client: redis.Redis, keys: Keys, groups: dict[str, tuple[int, bytes]]) -> dict[str, float]:
    pipeline = client.pipeline(transaction=False)
    for name, (_, last) in groups.items():
        pipeline.xrange(keys.calls(name), b"(" + last, "+", count=1)
    answers = cast("Any", pipeline.execute()) if groups else []
    return {
        name: int(entries[0][0].split(b"-")[0]) / 1000 for name, entries in zip(groups, answers, strict=True) if entries
    }


def _facts(
    name: str, facts: list[Any], now: float, groups: dict[str, tuple[int, bytes]], first: dict[str, float]
) -> QueueFacts:
    (*meta, limit, seen), queued, dead, due, low, beats, replicas, workers, _ = facts
    gone = {id_ for id_, beat in beats.items() if not beat.isdigit()}
    known = {id_: body for id_, body in replicas.items() if id_ not in gone}
    taken, _last = groups.get(name, (0, b""))
    return QueueFacts(
        *(name, meta, int(limit or 0), float(seen) if seen else None, queued, max(0, queued - taken), due, low, dead),
        max(0.0, now - first[name]) if name in first else 0.0,
        tuple(info for _, info in decode_infos(known, ReplicaInfo)),
        tuple(info for _, info in decode_infos(workers, WorkerInfo)),
    )
