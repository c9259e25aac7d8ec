"""Counts of ten seconds each, of every deployment: what its calls did, and how its queue was.

Replicas count their calls by themselves and add them up here every ten seconds, so that a call costs nothing in Redis.
Every function raises `BrokerUnavailable`, `ConfigurationError` or `CommandRefused` where Redis does not do what it is
told.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

import msgspec
import redis

from qserve.broker.connection import Connection, ignore_answer
from qserve.broker.keys import GROUP, Keys
from qserve.broker.redis_errors import our_errors
from qserve.broker.scripts import COUNT_CALLS
from qserve.wire.call_record import ENDS

BUCKET_S: Final = 10
KEPT_S: Final = 72 * 3600
_MOST_BUCKETS: Final = KEPT_S // BUCKET_S
_SAMPLER_MS: Final = 8_000

BOUNDS_MS: Final = tuple(0.1 * 10 ** (step / 6) for step in range(43))
"""Upper bounds of the histograms, six for each power of ten: 0.1 ms to 1,000 s. Times above go to one more place."""


class Bucket(msgspec.Struct, frozen=True, array_like=True):
    """Ten seconds of a deployment.

    Attributes:
        slot: Unix time divided by BUCKET_S.
        ever: How many entries the queue had been given when the bucket was last written.
        depth, waiting: The most calls that were queued or running, and that no replica had taken, when somebody looked.
        oldest_ms: The longest that the first of them had waited.
        ends: Names of outcomes, each followed by how many calls had it.
        waits, runs: Places in BOUNDS_MS, each followed by how many calls waited, and ran, for less than that.
    """

    slot: int
    arrivals: int
    ever: int
    depth: int
    waiting: int
    oldest_ms: float
    replicas: int
    ends: tuple[str | int, ...] = ()
    waits: tuple[int, ...] = ()
    runs: tuple[int, ...] = ()


_decode = msgspec.msgpack.Decoder(Bucket).decode


def add_counts(
    client: redis.Redis,
    keys: Keys,
    deployment: str,
    ends: Mapping[str, int],
    waits: Sequence[int],
    runs: Sequence[int],
) -> None:
    """Add what happened to calls of a deployment since the last time.

    Args:
        ends: Outcome -> how many calls had it.
        waits, runs: How many calls each place of the histograms has, as `Bucket` says.
    """
    counts = msgspec.msgpack.encode([_pairs(ends), _sparse(waits), _sparse(runs)])
    with our_errors(client):
        COUNT_CALLS.run(client, _names(keys, deployment), GROUP, counts, _MOST_BUCKETS, KEPT_S * 1000)


def send_ends(connection: Connection, keys: Keys, deployment: str, ends: Mapping[str, int]) -> None:
    """Add outcomes over the connection of an event loop, without waiting for it."""
    counts = msgspec.msgpack.encode([_pairs(ends), [], []])
    names = _names(keys, deployment)
    COUNT_CALLS.send(connection, ignore_answer, names, GROUP, counts, _MOST_BUCKETS, KEPT_S * 1000)


def sample_queues(client: redis.Redis, keys: Keys, process: str, deployments: Iterable[str]) -> None:
    """Note how the queues are, and forget calls in the index whose records are gone.

    Several processes may do this: only one of them does so every ten seconds.
    """
    with our_errors(client):
        if not client.set(keys.sampler, process, nx=True, px=_SAMPLER_MS):
            return
        for deployment in deployments:
            ended = [keys.index(deployment, state) for state in ENDS]
            COUNT_CALLS.run(client, _names(keys, deployment), GROUP, "", _MOST_BUCKETS, KEPT_S * 1000, *ended)


def read_buckets(
    client: redis.Redis, keys: Keys, deployments: Sequence[str], seconds: float
) -> tuple[float, list[list[Bucket]]]:
    """The time on Redis' clock, and the buckets of the last `seconds` of each deployment, oldest first."""
    pipeline = client.pipeline(transaction=False)
    pipeline.time()
    for deployment in deployments:
        pipeline.lrange(keys.buckets(deployment), 0, int(min(seconds, KEPT_S) // BUCKET_S) + 1)
    with our_errors(client):
        (whole, micros), *lists = cast("Any", pipeline.execute())
    now = whole + micros / 1e6
    first = int(now - seconds) // BUCKET_S
    found = []
    for packed in lists:
        buckets = []
        for each in packed:
            try:
                bucket = _decode(each)
            except msgspec.DecodeError:  # of a later version
                continue
            if bucket.slot < first:
                break
            buckets.append(bucket)
        found.append(buckets[::-1])
    return now, found


def _names(keys: Keys, deployment: str) -> tuple[str, ...]:
    return keys.buckets(deployment), keys.calls(deployment), keys.heartbeats(deployment), keys.low(deployment)


def _pairs(ends: Mapping[str, int]) -> list[str | int]:
    return [part for outcome, count in ends.items() if count for part in (outcome, count)]


def _sparse(counts: Sequence[int]) -> list[int]:
    return [part for place, count in enumerate(counts) if count for part in (place, count)]
