"""Which durable calls there are, by deployment and state, and what their records say in short.

The scripts that change a record keep the index. All of this goes over redis-py, takes time only for what it returns,
and raises `BrokerUnavailable`, `ConfigurationError` or `CommandRefused`.
"""

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, cast

import redis

from qserve.broker.keys import GROUP, Keys
from qserve.broker.redis_errors import our_errors
from qserve.broker.scripts import DESCRIBE, RUN_AGAIN
from qserve.wire.call_record import (
    CANCELLED,
    DEAD,
    DONE,
    EXPIRED,
    FAILED,
    QUEUED,
    RUNNING,
    SCHEDULED,
    CallRecord,
    parse_record,
)

STATES: Final = (QUEUED, SCHEDULED, RUNNING, DONE, FAILED, CANCELLED, DEAD, EXPIRED)
"""Every state of a durable call, in the order in which they are shown."""

Entry = tuple[float, str]
"""When a call entered its state (Unix time), and its id."""
ABOVE_ALL: Final[Entry] = (math.inf, "")

CHILDREN_KEPT: Final = 100
"""Of the durable calls that a call has made, the first so many are known; submit.lua keeps them."""
_COUNTED: Final = 100
"""Beyond this a call's place in its queue is not counted."""
_FIELDS: Final = (
    *("state", "deployment", "kind", "method", "attempts", "submitted", "started", "ended", "due", "expires"),
    *("error", "replica", "key", "parent", "part"),
)


class CallSummary(NamedTuple):
    """What a list of durable calls says of each.

    Attributes:
        submitted, started, ended, due, expires: Unix times on Redis' clock.
        error: Text of the last error.
        replica: Id of the replica that runs it.
        key: Its idempotency key, "" without one.
        parent: Id of the call that made it: the nearest durable one, if it is part of one. "" where none did.
        parts: How many parts its last attempt has given.
    """

    id: str
    state: str
    deployment: str
    kind: int
    method: str
    attempts: int
    submitted: float
    started: float | None
    ended: float | None
    due: float | None
    expires: float | None
    error: str
    replica: str
    key: str
    parent: str
    parts: int


def count_states(client: redis.Redis, keys: Keys, deployments: Sequence[str]) -> list[dict[str, int]]:
    """How many durable calls of each deployment are in each state."""
    pipeline = client.pipeline(transaction=False)
    for deployment in deployments:
        for state in STATES:
            pipeline.zcard(keys.index(deployment, state))
    with our_errors(client):
        found = iter(cast("list[int]", pipeline.execute()))
    return [{state: next(found) for state in STATES} for _ in deployments]


def newest_ids(
    client: redis.Redis, keys: Keys, places: list[tuple[str, str]], before: Entry, since: float, most: int
) -> list[Entry]:
    """The entries of calls in any of the places (deployment, state), the newest first.

    Places where there are none (any more) are taken from the list, so that nobody looks there again.

    Args:
        before: Only those that come behind this one. Of one moment there may be many.
        since: Only those that did not enter before that.
    """
    highest = "+inf" if before == ABOVE_ALL else f"{math.ceil(before[0] * 1000)}"
    found: dict[tuple[str, str], list[Entry]] = {place: [] for place in places}
    looked_at = dict.fromkeys(places, 0)
    while looked_at:
        pipeline = client.pipeline(transaction=False)
        for (deployment, state), count in looked_at.items():
            lowest = f"{since * 1000:.0f}"
            pipeline.zrevrangebyscore(keys.index(deployment, state), highest, lowest, count, most, withscores=True)
        with our_errors(client):
            parts = cast("Any", pipeline.execute())
        for place, part in zip(tuple(looked_at), parts, strict=True):
            entries = ((score / 1000, each.decode()) for each, score in part)
            found[place] += [entry for entry in entries if entry < before]
            looked_at[place] += most
            if len(part) < most or len(found[place]) >= most:
                del looked_at[place]
    places[:] = [place for place, entries in found.items() if entries]
    return sorted((entry for entries in found.values() for entry in entries), reverse=True)[:most]


def ids_of_key(client: redis.Redis, keys: Keys, idempotency_key: str) -> list[str]:
    """The durable calls that have an idempotency key, as long as that holds: several where clients chose the same."""
    found: list[tuple[bytes, float]] = []
    with our_errors(client):
        for each in keys.all():
            found += cast("Any", client.zrevrangebyscore(each.named(idempotency_key), "+inf", "-inf", withscores=True))
    return [call.decode() for call, _ in sorted(found, key=lambda pair: -pair[1])]


def children_of(client: redis.Redis, keys: Keys, ids: Sequence[str]) -> list[tuple[int, list[str]]]:
    """How many durable calls each of these has made, and the ids of the first of them."""
    names = ["children", *(f"c{place}" for place in range(1, CHILDREN_KEPT + 1))]
    pipeline = client.pipeline(transaction=False)
    for call_id in ids:
        pipeline.hmget(keys.call(call_id), names)
    with our_errors(client):
        found = cast("list[list[bytes | None]]", pipeline.execute() if ids else [])
    return [(int(count or 0), [each.decode() for each in made if each]) for count, *made in found]


def summaries(client: redis.Redis, keys: Keys, ids: Sequence[str]) -> dict[str, CallSummary]:
    """What the records of these calls say; those whose records are gone are left out."""
    pipeline = client.pipeline(transaction=False)
    for call_id in ids:
        pipeline.hmget(keys.call(call_id), _FIELDS)
    with our_errors(client):
        found = cast("list[list[bytes | None]]", pipeline.execute() if ids else [])
    return {
        call_id: _summary(call_id, dict(zip(_FIELDS, fields, strict=True)))
        for call_id, fields in zip(ids, found, strict=True)
        if fields[0] is not None and fields[1] is not None
    }


def describe_now(client: redis.Redis, keys: Keys, call_id: str) -> CallRecord | None:
    """The record of a call with its events; None if there is none (any more)."""
    with our_errors(client):
        answer = DESCRIBE.run(client, (keys.call(call_id),), keys.of_call(call_id).base, _COUNTED, 0, GROUP)
    return parse_record(call_id, answer)


def frame_of(client: redis.Redis, keys: Keys, call_id: str) -> bytes | None:
    """The sealed call as it will be run, or was where it can run again; None where it is not kept any more."""
    with our_errors(client):
        deployment, waits, again, entry = cast(
            "list[bytes | None]", client.hmget(keys.call(call_id), "deployment", "frame", "again", "entry")
        )
        if waits or again or not deployment or not entry:
            return waits or again
        found = cast("Any", client.xrange(keys.calls(deployment.decode()), entry, entry))
    return found[0][1].get(b"d") if found else None


def result_frame(client: redis.Redis, keys: Keys, call_id: str) -> bytes | None:
    """The sealed reply of a call that has ended."""
    with our_errors(client):
        return cast("bytes | None", client.hget(keys.call(call_id), "result"))


def progress_frame(client: redis.Redis, keys: Keys, call_id: str) -> bytes | None:
    """The sealed reply with what user code reported last."""
    with our_errors(client):
        return cast("bytes | None", client.hget(keys.call(call_id), "progress"))


def newest_parts(client: redis.Redis, keys: Keys, call: CallSummary, most: int) -> list[bytes]:
    """Sealed replies with the last parts that the last attempt of a call has given, in their order."""
    with our_errors(client):
        highest, lowest = f"{call.attempts}-18446744073709551615", f"{call.attempts}-0"
        found = cast("Any", client.xrevrange(keys.parts(call.id), highest, lowest, count=most))
    return [fields[b"d"] for _, fields in reversed(found)]


def run_again(client: redis.Redis, keys: Keys, deployment: str, call_id: str) -> str:
    """Put a call that has failed on the queue again; what run_again.lua returns."""
    names = keys.of(deployment).whole(keys.calls(deployment), keys.call(call_id), keys.payload(call_id))
    with our_errors(client):
        return bytes(RUN_AGAIN.run(client, names, call_id)).decode()


def _summary(call_id: str, fields: dict[str, bytes | None]) -> CallSummary:
    def text(name: str) -> str:
        return (fields[name] or b"").decode("utf-8", "replace")

    def moment(name: str) -> float | None:
        found = fields[name]
        return int(found) / 1000 if found is not None else None

    return CallSummary(
        *(call_id, text("state"), text("deployment"), int(fields["kind"] or 0), text("method")),
        *(int(fields["attempts"] or 0), moment("submitted") or 0.0, moment("started"), moment("ended")),
        *(moment("due"), moment("expires"), text("error"), text("replica")),
        *(text("key"), text("parent"), int(fields["part"] or 0)),
    )
