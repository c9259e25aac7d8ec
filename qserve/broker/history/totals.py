"""What has happened to the calls and replicas of each deployment, added up for metrics: numbers that only grow.

A field is `WHAT LABEL`. Everybody adds what was seen since the last time, so that no process has to be asked, and what
a process that is gone has seen stays. Every function that takes a client raises `BrokerUnavailable`,
`ConfigurationError` or `CommandRefused` where Redis does not do what it is told.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

import msgspec
import redis

from qserve.broker.connection import Connection, ignore_answer
from qserve.broker.keys import Keys
from qserve.broker.redis_errors import our_errors
from qserve.broker.scripts import ADD_SERIES
from qserve.errors import BrokerUnavailable

_KEPT_MS: Final = 30 * 24 * 3600 * 1000
"""Of a deployment to which nothing happens for so long, nothing is known any more."""
_EXPORTER_MS: Final = 60_000
MOST_SERIES: Final = 1_000
"""How many combinations of tags a metric of user code has in a deployment; others are not counted."""
_MOST_FIELDS: Final = 20_000
"""How many fields a deployment has; beyond them no further series of user code is counted."""
_SERIES_AT_ONCE: Final = 500
"""Redis does nothing else meanwhile: about 2 ms."""


class UserSeries(NamedTuple):
    """What was counted of one metric of user code with one combination of tags."""

    metric: str
    fields: dict[str, int]
    """The first is one that every value of the series has counted in."""


def add_totals(client: redis.Redis, keys: Keys, deployment: str, counts: Mapping[str, int]) -> None:
    """Add what was seen since the last time."""
    pipeline = client.pipeline(transaction=False)
    for field, count in counts.items():
        if count:
            pipeline.hincrby(keys.totals(deployment), field, count)
    pipeline.pexpire(keys.totals(deployment), _KEPT_MS)
    with our_errors(client):
        pipeline.execute()


def add_series(client: redis.Redis, keys: Keys, deployment: str, counted: Sequence[UserSeries]) -> int:
    """Add what user code has counted since the last time; returns how many series there was no room for."""
    dropped = 0
    for first in range(0, len(counted), _SERIES_AT_ONCE):
        series = [
            (metric, [part for field, count in fields.items() for part in (field, str(count))])
            for metric, fields in counted[first : first + _SERIES_AT_ONCE]
        ]
        packed = msgspec.msgpack.encode(series)
        with our_errors(client):
            dropped += ADD_SERIES.run(
                *(client, (keys.totals(deployment),), packed, MOST_SERIES, _MOST_FIELDS, _KEPT_MS)
            )
    return dropped


def send_total(connection: Connection, keys: Keys, deployment: str, field: str, count: int) -> None:
    """Add to one field over the connection of an event loop, without waiting for it."""
    connection.send(ignore_answer, "HINCRBY", keys.totals(deployment), field, count)
    connection.send(ignore_answer, "PEXPIRE", keys.totals(deployment), _KEPT_MS)


def read_totals(client: redis.Redis, keys: Keys, deployments: Sequence[str]) -> list[dict[str, int]]:
    """The fields of each deployment."""
    pipeline = client.pipeline(transaction=False)
    for deployment in deployments:
        pipeline.hgetall(keys.totals(deployment))
    with our_errors(client):
        found = cast("list[dict[bytes, bytes]]", pipeline.execute() if deployments else [])
    return [{field.decode(): int(count) for field, count in fields.items()} for fields in found]


def become_exporter(client: redis.Redis, keys: Keys, gateway: str, alive: Mapping[str, Any]) -> bool:
    """Whether a gateway is, of all that are scraped, the one that shows the metrics of the whole instance.

    It stays so as long as it is scraped and lives.

    Args:
        alive: Ids of the gateways that live.
    """
    try:
        with our_errors(client):
            if client.set(keys.exporter, gateway, nx=True, px=_EXPORTER_MS):
                return True
            holder = _exporter(client, keys)
            if holder != gateway and holder in alive:
                return False
            client.set(keys.exporter, gateway, px=_EXPORTER_MS)
    except BrokerUnavailable as exc:
        if not isinstance(exc.__cause__, redis.ResponseError):
            raise
        # It answers and takes no writes, for want of memory or disk: then most of all it has to be seen.
        with our_errors(client):
            holder = _exporter(client, keys)
        return gateway == (holder if holder in alive else min(alive, default=gateway))
    return True


def _exporter(client: redis.Redis, keys: Keys) -> str:
    return (cast("bytes | None", client.get(keys.exporter)) or b"").decode()
