"""Heartbeats of replicas: a counter for each, which its neighbours watch on their own clocks.

All of this is for threads and processes other than the replica's event loop. It goes over redis-py, and every function
raises `BrokerUnavailable`, `ConfigurationError` or `CommandRefused` where Redis does not do what it is told.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import redis

from qserve.broker.inboxes import control_frame, tell_now
from qserve.broker.keys import GROUP, Keys
from qserve.broker.redis_errors import our_errors
from qserve.broker.scripts import BEAT, DEMAND, RETIRE
from qserve.failpoints import reach
from qserve.wire.messages import Control, Signer

DIED, LEFT = "dead", "left"
"""What stands in place of a counter: the replica has died, or has left after it handed back what it had not started."""


def beat(
    client: redis.Redis, keys: Keys, deployment: str, replica: str, entries: Sequence[bytes], *, serving: bool
) -> list[bytes]:
    """Say that a replica lives; with entry ids, return those that it no longer owns.

    For the heartbeat thread, which has a connection of its own.
    """
    names = (keys.calls(deployment), keys.heartbeats(deployment), keys.meta(deployment))
    with our_errors(client):
        lost: list[bytes] = BEAT.run(client, names, GROUP, replica, "1" if serving else "0", *entries)
    return lost


class Demand(NamedTuple):
    """What there is to do for a deployment.

    Attributes:
        calls: Queued and running.
        waited_s: How long the first call that nobody has taken has waited.
        nodes: Ids of the live nodes that serve it, and of workers started by hand.
    """

    calls: int
    waited_s: float
    nodes: tuple[str, ...]


def measure(client: redis.Redis, keys: Keys, deployment: str) -> Demand:
    """Look how much there is to do for a deployment, from the heartbeat thread."""
    names = (keys.calls(deployment), keys.low(deployment), keys.workers(deployment))
    with our_errors(client):
        calls, waited_ms, *nodes = DEMAND.run(client, names, GROUP, keys.of(deployment).alive(""))
    return Demand(calls, waited_ms / 1000, tuple(sorted(node.decode() for node in nodes)))


def leave(client: redis.Redis, keys: Keys, deployment: str, replica: str, *, all_answered: bool) -> bool:
    """Forget a replica that leaves; False if calls that it never started wait for a neighbour to take them.

    Args:
        all_answered: Every call it started is answered for certain; else those still pending count as started.
    """
    names = (keys.calls(deployment), keys.heartbeats(deployment), keys.replicas(deployment), keys.models(deployment))
    with our_errors(client):
        client.hset(keys.heartbeats(deployment), replica, LEFT if all_answered else DIED)
        client.hdel(keys.replicas(deployment), replica)
        return bool(RETIRE.run(client, names, GROUP, replica))


def mark_dead(client: redis.Redis, keys: Keys, deployment: str, replica: str) -> None:
    """Let whoever looks at a replica's heartbeat see that it has died."""
    with our_errors(client):
        client.hset(keys.heartbeats(deployment), replica, DIED)


def post_tombstone(client: redis.Redis, keys: Keys, deployment: str, replica: str, signer: Signer) -> None:
    """Make a replica's death known, so that its neighbours take over its calls at once.

    For whoever saw the process die.
    """
    reach("tombstone")
    mark_dead(client, keys, deployment, replica)
    reach("tombstone-set")
    call_neighbours(client, keys, deployment, replica, signer)


def call_neighbours(client: redis.Redis, keys: Keys, deployment: str, replica: str, signer: Signer) -> None:
    """Ask every other replica of a deployment to look for calls to take over."""
    with our_errors(client):
        known = cast("list[bytes]", client.hkeys(keys.heartbeats(deployment)))
        for neighbour in (field.decode() for field in known):
            if neighbour != replica:
                tell_now(client, keys.of(deployment), neighbour, control_frame(signer, neighbour, Control("sweep")))
