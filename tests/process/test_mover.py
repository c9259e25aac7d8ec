"""Durable calls on their way to the queue: whoever moves them is told of one in time, and asks seldom else."""

import asyncio
from typing import Any

import pytest
import redis

from qserve.broker.inboxes import control_frame, tell_now
from qserve.broker.link import Link
from qserve.settings import Settings
from qserve.wire.call_record import DurableOptions
from qserve.wire.messages import PYTHON, Control
from qserve_workers.calls import mover as mover_module
from qserve_workers.calls.mover import Mover
from tests.support.calling import Caller, calling, deploy
from tests.support.chosen_server import needs_one_server
from tests.support.replicas import World
from tests.support.waiting import until

NAME = "Echo"
pytestmark = needs_one_server  # a replica is played by a client that has its inbox at home


async def submit(caller: Caller, **options: Any) -> None:
    """Submit a durable call and wait until it is accepted."""
    accepted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    submissions = caller.client.durable.submissions
    made = submissions.prepare(
        NAME, kind=PYTHON, method="", payload=b"", options=DurableOptions(**options), on_admitted=accepted.set_result
    )
    submissions.submit(made)
    await until(accepted.done)
    assert accepted.result() == made.call.id


async def test_the_mover_is_told_of_a_call_that_is_due_before_it_would_look(
    settings: Settings, redis_client: "redis.Redis"
) -> None:
    deploy(settings)
    async with calling(settings) as replica, calling(settings) as caller:
        told: list[str] = []
        replica.client.on_control = lambda _about, control: told.append(control.verb)
        redis_client.set(settings.keys.mover(NAME), replica.client.id)
        for options in ({"delay_s": 60.0}, {"delay_s": 1.0}, {"delay_s": 1.2}, {"low_priority": True}) * 2:
            await submit(caller, **options)
        frame = control_frame(replica.client.signer, replica.client.id, Control("sweep"))
        assert tell_now(redis_client, settings.keys, replica.client.id, frame)

        # The first that is due within a second, and the first of low priority; others wait behind them.
        await until(lambda: told[-1:] == ["sweep"])
        assert told == ["move", "move", "sweep"]


async def test_a_mover_that_is_told_looks_at_once(
    settings: Settings, redis_client: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mover_module, "_LOOK_EVERY_S", 3600.0)
    deploy(settings)

    async def nothing() -> None: ...

    link = Link(settings.redis_url, nothing)
    await link.start()
    mover = Mover(settings, NAME, "replica", link)
    mover.start()
    try:
        await until(lambda: redis_client.get(settings.keys.mover(NAME)) == b"replica")
        async with calling(settings) as caller:
            await submit(caller, low_priority=True)
            mover.wake()
            await until(lambda: redis_client.xlen(settings.keys.calls(NAME)) == 1)
    finally:
        await mover.stop()
        await link.stop()


async def test_a_replica_that_has_nothing_to_do_asks_for_due_calls_once_a_second(world: World) -> None:
    world.deploy()
    await world.start()

    def counts() -> tuple[int, int]:
        found: Any = world.redis.info("commandstats")
        looks, seconds = (found.get(f"cmdstat_{each}", {"calls": 0})["calls"] for each in ("zrangebyscore", "pexpire"))
        return looks, seconds

    looks, seconds = counts()
    await until(lambda: counts()[1] >= seconds + 3)  # its inbox stays for another while: said once a second

    assert counts()[0] - looks <= 5
