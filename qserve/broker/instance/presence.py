"""Who is there: each process says so again and again under a key of its own, which expires when it no longer does.

How long that takes is a matter of the role. Nothing else decides that a process has gone, except that the calls of a
replica are taken over as soon as its heartbeat stands still (`qserve.broker.instance.heartbeats`).
"""

from typing import TYPE_CHECKING, Final

from qserve.broker.connection import Connection
from qserve.broker.keys import Keys
from qserve.broker.redis_errors import our_errors

if TYPE_CHECKING:
    import redis

CALLER_TTL_MS: Final = 25_000
"""Of every process with an inbox: callers, gateways and replicas. It says so every second.

The time is long, so that a server which stands still for 20 s forgets nobody; within a minute nothing is left of a
process that was killed. Every second, because a server whose clock jumps ahead forgets everybody at once, again and
again if the clock does."""
NODE_TTL_MS: Final = 15_000
"""Of a node, which says so every 5 s."""
WORKER_TTL_MS: Final = 30_000
"""Of a Celery worker that no node keeps, which says so every 10 s, from an event loop that children may hold up."""


def say_worker_alive(client: "redis.Redis", keys: Keys, worker: str) -> None:
    """Say that a worker lives which no node keeps; raises as `say_gone` does."""
    with our_errors(client):
        client.set(keys.alive(worker), 1, px=WORKER_TTL_MS)


def say_gone(client: "redis.Redis", keys: Keys, process: str) -> None:
    """Say that a process has ended.

    Raises:
        BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be told.
    """
    with our_errors(client):
        client.delete(keys.alive(process))


async def alive_for_ms(connection: Connection, keys: Keys, process: str) -> int:
    """For how long a process still counts as there if it says nothing more; negative if it does not.

    Raises like `Connection.call`.
    """
    return int(await connection.call("PTTL", keys.alive(process)))
