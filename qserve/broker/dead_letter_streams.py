"""The streams of dead letters, one for each deployment. All functions block, and raise the errors of `letters`."""

import re
from collections.abc import Sequence
from typing import Any, Final, cast

import redis

from qserve.broker.keys import Keys
from qserve.broker.redis_errors import our_errors
from qserve.broker.scripts import REVIVE

DEAD_LETTERS_KEPT: Final = 10_000
"""The most letters that a stream holds; the oldest go first."""
_is_letter_id = re.compile(r"\d{1,19}-\d{1,19}").fullmatch


def letters(client: redis.Redis, keys: Keys, deployment: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """The (id, fields) of every letter of a deployment, oldest first.

    Raises:
        BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be asked.
    """
    with our_errors(client):
        found: Any = client.xrange(keys.dead_letters(deployment), count=DEAD_LETTERS_KEPT)
    return list(found)


def newest_letters(
    client: redis.Redis, keys: Keys, deployment: str, most: int, before: str = "+"
) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """The (id, fields) of the newest letters of a deployment with ids below `before`, the newest first."""
    highest = before if before == "+" else f"({before}"
    with our_errors(client):
        found: Any = client.xrevrange(keys.dead_letters(deployment), highest, "-", count=most)
    return list(found)


def deployment_names(client: redis.Redis, keys: Keys) -> list[str]:
    """The names of all deployments, in order."""
    with our_errors(client):
        found = [name for each in keys.all() for name in cast("set[bytes]", client.smembers(each.deployments))]
    return sorted(name.decode() for name in found)


def letter_of(client: redis.Redis, keys: Keys, deployment: str, wanted: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """The (id, fields) of the letter with an id, or that a durable call's record names; empty if that says nothing."""
    with our_errors(client):
        noted = cast("bytes | None", client.hget(keys.call(wanted), "letter"))
        letter = noted.decode() if noted else wanted
        if _is_letter_id(letter) is None:
            return []
        found: Any = client.xrange(keys.dead_letters(deployment), letter, letter)
    return list(found)


def attempts_of(client: redis.Redis, keys: Keys, ids: Sequence[str]) -> dict[str, int | None]:
    """How often durable calls were started; None of those whose records are gone."""
    pipeline = client.pipeline(transaction=False)
    for call_id in ids:
        pipeline.hget(keys.call(call_id), "attempts")
    with our_errors(client):
        found = cast("list[bytes | None]", pipeline.execute() if ids else [])
    return {call_id: int(each) if each is not None else None for call_id, each in zip(ids, found, strict=True)}


def revive(client: redis.Redis, keys: Keys, deployment: str, letter: str, call_id: str) -> str:
    """Put the dead letter of a durable call on the queue again; what revive.lua returns."""
    names = keys.of(deployment).whole(
        keys.dead_letters(deployment), keys.calls(deployment), keys.call(call_id), keys.payload(call_id)
    )
    with our_errors(client):
        return bytes(REVIVE.run(client, names, letter, call_id)).decode()


def drop_letter(client: redis.Redis, keys: Keys, deployment: str, letter: str) -> None:
    """Delete a letter."""
    with our_errors(client):
        client.xdel(keys.dead_letters(deployment), letter)
