"""Deployments without replicas: noting that nobody needs one, and noticing the call that does.

A call is put on the queue of a deployment that sleeps as on any other, so callers neither know nor pay. Whoever is to
start replicas waits for the first entry of the queue, and looks for durable calls beside it that are due.
"""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from qserve.broker.keys import Keys
from qserve.broker.redis_errors import our_errors
from qserve.broker.scripts import SLEEP

if TYPE_CHECKING:
    import redis.asyncio

_EARLY_MS = 1000
"""A call that is due so soon wakes its deployment: starting takes about as long."""
_LOG_LENGTH = 1000


async def put_to_sleep(
    client: "redis.asyncio.Redis", keys: Keys, name: str, generation: int, *, seen: int, quiet_ms: int
) -> bool:
    """Note that a deployment sleeps, unless it is needed; raises like `report_node`.

    Args:
        seen: What `calls_ever` gave when it was looked at last: no call may have come since.
        quiet_ms: No durable call may become due within that time.
    """
    names = (keys.meta(name), keys.calls(name), keys.low(name), keys.due(name))
    with our_errors(client):
        if not await SLEEP.run_async(client, names, generation, seen, quiet_ms):
            return False
        await _log(client, keys, "sleep", name)
    return True


async def wake(client: "redis.asyncio.Redis", keys: Keys, name: str) -> bool:
    """Note that a deployment sleeps no longer; False if it did not. Raises like `report_node`."""
    with our_errors(client):
        if not await cast("Any", client.hdel(keys.meta(name), "asleep")):
            return False
        await _log(client, keys, "wake", name)
    return True


async def calls_ever(client: "redis.asyncio.Redis", keys: Keys, names: Sequence[str]) -> dict[str, int]:
    """How many calls have ever been put on the queues of these deployments; raises like `report_node`."""
    with our_errors(client):
        pipeline = client.pipeline(transaction=False)
        for name in names:
            pipeline.xinfo_stream(keys.calls(name))
        answers = await pipeline.execute(raise_on_error=False) if names else []
    found = {}
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, dict):
            found[name] = int(answer["entries-added"])
    return found


async def needed(client: "redis.asyncio.Redis", keys: Keys, names: Sequence[str], block_ms: int) -> list[str]:
    """Those of the deployments that have calls to run; waits until there is one, but no longer than so long.

    Raises like `report_node`.
    """
    with our_errors(client):
        seconds, micros = cast("Any", await client.time())
        pipeline = client.pipeline(transaction=False)
        for name in names:
            pipeline.zcard(keys.low(name))
            pipeline.zrange(keys.due(name), 0, 0, withscores=True)
        answers = await pipeline.execute()
        now_ms = seconds * 1000 + micros / 1000
        due = [
            name
            for name, low, first in zip(names, answers[::2], answers[1::2], strict=True)
            if low or (first and first[0][1] <= now_ms + _EARLY_MS)
        ]
        if due:
            return due
        queues = [keys.calls(name) for name in names]
        waiting = await (_first_entries(client, queues, block_ms) if keys.shards == 1 else _not_empty(client, queues))
    if not waiting and keys.shards > 1:
        await asyncio.sleep(block_ms / 1000)
    return [name for name, queue in zip(names, queues, strict=True) if queue in waiting]


async def _first_entries(client: "redis.asyncio.Redis", queues: Sequence[str], block_ms: int) -> set[str]:
    found: Any = await client.xread(dict.fromkeys(queues, "0"), count=1, block=block_ms)
    return {key.decode() for key, _ in found or ()}


async def _not_empty(client: "redis.asyncio.Redis", queues: Sequence[str]) -> set[str]:
    """On a cluster the queues lie in several slots, and nothing waits for all of them."""
    pipeline = client.pipeline(transaction=False)
    for queue in queues:
        pipeline.xlen(queue)
    return {queue for queue, length in zip(queues, await pipeline.execute(), strict=True) if length}


async def _log(client: "redis.asyncio.Redis", keys: Keys, kind: str, name: str) -> None:
    await client.xadd(keys.log, {"kind": kind, "name": name}, maxlen=_LOG_LENGTH, approximate=True)
