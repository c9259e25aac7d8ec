"""The queue of a deployment, as its callers see it.

A deployment's calls stand in one stream, read by all of its replicas through one consumer group. An entry stays in the
stream until it is answered, so the length of the stream counts the calls that wait and those that run.
"""

import asyncio
from collections.abc import Callable, Sequence

from qserve.broker.connection import Answer, Connection
from qserve.broker.keys import GROUP, Keys
from qserve.broker.scripts import ADMIT, CANCEL, FIND
from qserve.wire.messages import SAFE

CALLS_PER_ADMIT = 256


class CallQueue:
    """One deployment's queue, for its callers, who put calls on it and cancel them."""

    def __init__(self, keys: Keys, deployment: str) -> None:
        waiting = (keys.due(deployment), keys.low(deployment))
        self._admit_keys = (keys.calls(deployment), keys.meta(deployment), keys.instance, *waiting)
        self._stream = keys.calls(deployment)
        self.is_idempotent = False
        """Whether all calls may run again, as Redis has said last."""

    def put(
        self,
        connection: Connection,
        calls: Sequence[tuple[str, bool, bytes]],
        on_answer: Callable[[Answer], None],
        *,
        latest_ms: int = 0,
    ) -> None:
        """Put (id, safe, frame) of at most CALLS_PER_ADMIT calls; `on_answer` gets what admit.lua returns.

        Args:
            latest_ms: When it is too late to, on Redis' clock; 0: never.
        """
        arguments: list[str | bytes | int] = [latest_ms]
        for call_id, safe, frame in calls:
            arguments += (call_id, SAFE if safe else "", frame)
        ADMIT.send(connection, on_answer, self._admit_keys, *arguments)

    async def find(self, connection: Connection, calls: Sequence[str], age_ms: int) -> list[bytes | None]:
        """The entry of each call, by the ids of the calls; None for one that has none.

        Args:
            age_ms: The oldest of the calls was put at most so long ago."""
        found: list[bytes | None] = await FIND.call(connection, (self._stream,), age_ms, *calls)
        return found

    async def has(self, connection: Connection, entry: bytes) -> bool:
        """Whether an entry stands in the queue: its call waits or runs."""
        return bool(await connection.call("XRANGE", self._stream, entry, entry))

    def cancel(self, connection: Connection, entry: bytes, on_answer: Callable[[Answer], None]) -> None:
        """Withdraw an entry; `on_answer` gets 1, 0 or the replica that has it."""
        CANCEL.send(connection, on_answer, (self._stream,), GROUP, entry)


async def last_seen(connection: Connection, keys: Keys, deployment: str) -> tuple[int, int, str]:
    """When a replica of a deployment was seen last (0: never), what time it is, and its `Deployed.paused`.

    Both times are in seconds on Redis' clock.
    """
    (seen, paused), now = await asyncio.gather(
        connection.call("HMGET", keys.meta(deployment), "last_seen", "paused"), connection.call("TIME")
    )
    return int(seen or 0), int(now[0]), (paused or b"").decode(errors="replace")
