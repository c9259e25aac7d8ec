"""Which nodes are to run nothing: a hash of node ids, each with since when and by whom, as `paused` in a meta hash.

All functions raise `BrokerUnavailable`, `ConfigurationError` or `CommandRefused` where Redis does not do what it is
told.
"""

from typing import TYPE_CHECKING, Any, cast

from qserve.broker.keys import Keys
from qserve.broker.redis_errors import our_errors

if TYPE_CHECKING:
    import redis
    import redis.asyncio


def drain_node(client: "redis.Redis", keys: Keys, node: str, who: str) -> None:
    """Let a node run nothing from now on, or go on if `who` is "", and let everybody know."""
    with our_errors(client):
        if who:
            seconds, _ = cast("Any", client.time())
            client.hset(keys.drained, node, f"{seconds} {who[:200]}")
        else:
            client.hdel(keys.drained, node)
        client.xadd(keys.log, {"kind": "node", "name": node}, maxlen=1000, approximate=True)


async def read_drained(client: "redis.asyncio.Redis", keys: Keys, node: str) -> str:
    """Since when and by whom a node is to run nothing; "" if it is not."""
    with our_errors(client):
        found: bytes | None = await cast("Any", client.hget(keys.drained, node))
    return (found or b"").decode(errors="replace")
