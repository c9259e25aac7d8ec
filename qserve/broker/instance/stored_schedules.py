"""Schedules as Redis keeps them: sealed frames by name. All functions block, and raise the errors of
`read_schedule`.
"""

from typing import Any, cast

import redis

from qserve.broker.keys import Keys
from qserve.broker.redis_errors import our_errors


def read_schedule(client: redis.Redis, keys: Keys, name: str) -> bytes | None:
    """The frame of a schedule; None if there is none.

    Raises:
        BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be asked.
    """
    with our_errors(client):
        return cast("bytes | None", client.hget(keys.schedules, name))


def read_schedules(client: redis.Redis, keys: Keys) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """The frames of all schedules, and what became of the last moment of each, by name."""
    with our_errors(client):
        # Not in the order in which they are written: so no schedule is read without what became of its last moment.
        fired = cast("Any", client.hgetall(keys.fired))
        return cast("Any", client.hgetall(keys.schedules)), fired


def read_fired(client: redis.Redis, keys: Keys, name: str) -> bytes | None:
    """What became of the last moment of a schedule; None if that is not known."""
    with our_errors(client):
        return cast("bytes | None", client.hget(keys.fired, name))


def write_schedule(client: redis.Redis, keys: Keys, name: str, frame: bytes) -> None:
    """Put a schedule in place of one with the same name, and let everybody know."""
    with our_errors(client):
        client.hset(keys.schedules, name, cast("Any", frame))
        client.hdel(keys.fired, name)  # not before: the schedule that was there would repeat its last moment
        _tell(client, keys)


def remove_schedule(client: redis.Redis, keys: Keys, name: str) -> bool:
    """Forget a schedule, and let everybody know; False if there was none."""
    with our_errors(client):
        removed = bool(client.hdel(keys.schedules, name))
        client.hdel(keys.fired, name)  # not before, as in `write_schedule`
        client.hdel(keys.paused_schedules, name)
        if removed:
            _tell(client, keys)
    return removed


def pause_schedule(client: redis.Redis, keys: Keys, name: str, paused: str) -> None:
    """Let a schedule submit nothing from now on, or go on if `paused` is "", and let everybody know."""
    with our_errors(client):
        if paused:
            client.hset(keys.paused_schedules, name, paused)
        else:
            client.hdel(keys.paused_schedules, name)
        _tell(client, keys)


def read_paused_schedules(client: redis.Redis, keys: Keys) -> dict[str, str]:
    """Since when and by whom schedules are paused, by name."""
    with our_errors(client):
        found = cast("Any", client.hgetall(keys.paused_schedules))
    return {name.decode(errors="replace"): paused.decode(errors="replace") for name, paused in found.items()}


def note_fired(client: redis.Redis, keys: Keys, name: str, fired: bytes) -> None:
    """Keep what became of a moment of a schedule."""
    with our_errors(client):
        client.hset(keys.fired, name, cast("Any", fired))


def redis_time(client: redis.Redis) -> float:
    """Unix time on Redis' clock, which is the same for everybody."""
    with our_errors(client):
        seconds, micros = cast("Any", client.time())
    return float(seconds + micros / 1e6)


def _tell(client: redis.Redis, keys: Keys) -> None:
    client.xadd(keys.log, {"kind": "schedule"}, maxlen=1000, approximate=True)
