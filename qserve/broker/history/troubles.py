"""Ordinary calls that failed, were refused or took long: a capped stream for each deployment.

They leave no record, so this is all that is known of them. Notes are not signed, and only shown to people.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final, cast

import msgspec
import redis

from qserve.broker.connection import Connection, ignore_answer
from qserve.broker.keys import Keys
from qserve.broker.redis_errors import our_errors

TROUBLES_KEPT: Final = 1_000
LONGEST_TEXT: Final = 2_000


class Trouble(msgspec.Struct, frozen=True, omit_defaults=True):
    """One note.

    Attributes:
        what: "failed", "slow", "refused", "gave up" where the caller did not wait any longer, "lost" where its
            replica died and it runs again, "died" for the replica itself, or "stacks" that somebody asked for.
        call: Id of the call; "" where the note is about several.
        request: The X-Request-Id of an HTTP request.
        times: How many calls, or deaths, the note is about.
        error: Class and text of the error.
        traceback: The end of it.
        replica: Tag of the replica, with host and pid.
    """

    what: str
    call: str = ""
    request: str = ""
    method: str = ""
    times: int = 1
    error: str = ""
    traceback: str = ""
    replica: str = ""
    waited_ms: float = 0.0
    ran_ms: float = 0.0


def note_troubles(client: redis.Redis, keys: Keys, deployment: str, troubles: Iterable[Trouble]) -> None:
    """Note calls, from a thread beside the event loop.

    Raises:
        BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be told.
    """
    pipeline = client.pipeline(transaction=False)
    for trouble in troubles:
        pipeline.xadd(keys.troubles(deployment), {"d": msgspec.msgpack.encode(trouble)}, maxlen=TROUBLES_KEPT)
    with our_errors(client):
        pipeline.execute()


def send_trouble(connection: Connection, keys: Keys, deployment: str, trouble: Trouble) -> None:
    """Note calls over the connection of an event loop, without waiting for it."""
    packed = msgspec.msgpack.encode(trouble)
    connection.send(ignore_answer, "XADD", keys.troubles(deployment), "MAXLEN", "~", TROUBLES_KEPT, "*", "d", packed)


def read_troubles(
    client: redis.Redis, keys: Keys, deployments: Sequence[str], before: str = "+", most: int = 100
) -> list[tuple[str, str, Trouble]]:
    """(id of the note, deployment, note), the newest first; raises like `note_troubles`.

    Args:
        before: Only notes with lower ids; "+" for all.
    """
    pipeline = client.pipeline(transaction=False)
    for deployment in deployments:
        pipeline.xrevrange(keys.troubles(deployment), before if before == "+" else f"({before}", "-", count=most)
    with our_errors(client):
        found = cast("Any", pipeline.execute())
    notes = []
    for deployment, entries in zip(deployments, found, strict=True):
        for entry, fields in entries:
            try:
                trouble = msgspec.msgpack.decode(fields.get(b"d", b""), type=Trouble)
            except msgspec.DecodeError:  # not ours
                continue
            notes.append((entry.decode(), deployment, trouble))
    notes.sort(key=lambda note: tuple(int(part) for part in note[0].split("-")), reverse=True)
    return notes[:most]
