"""A replica that is alone and that nobody calls does seldom what it does every second otherwise."""

import time
from typing import Any

from qserve.broker.link import REST_S
from qserve.settings import Settings
from tests.support.calling import calling, within
from tests.support.replicas import NAME, World
from tests.support.waiting import until

_AT_LEAST = 0.6
"""In parts of a rest: a heartbeat may be seen late, and the next one at once. Awake, it is a third."""
_OF_REPLICAS = ("evalsha", "hgetall", "ping", "time", "xread", "xreadgroup")


async def test_a_replica_rests_while_it_is_alone_and_nobody_calls(world: World, settings: Settings) -> None:
    world.settings = settings
    world.deploy()
    [first] = await world.start()

    async def until_beats(number: int) -> float:
        """Wait for so many heartbeats; how long that took."""
        began, last = time.monotonic(), beat() + number
        await until(lambda: beat() >= last)
        return time.monotonic() - began

    def beat() -> int:
        return int(world.redis.hget(world.keys.heartbeats(NAME), first.id) or 0)

    def rests() -> bool:
        return world.redis.pttl(world.keys.mover(NAME)) > 1000 * REST_S

    def commands() -> int:
        found: Any = world.redis.info("commandstats")
        return sum(found.get(f"cmdstat_{each}", {"calls": 0})["calls"] for each in _OF_REPLICAS)

    await until(rests)
    await until_beats(2)  # the first may have been due already, and the next is at the common moment
    before = commands()
    assert await until_beats(1) > _AT_LEAST * REST_S
    assert commands() - before <= 30

    async with calling(settings) as caller:
        assert caller.value(await within(caller.call(None, "pid", deployment=NAME)[1])) == first.pid
        assert await until_beats(1) < REST_S  # what runs is said soon, not when the rest would be over

    await world.start()
    assert await until_beats(3) < 3 * REST_S
    await until(lambda: not rests())  # the lease that was taken while it rested is longer
