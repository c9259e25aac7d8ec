"""Calls for a model go to a replica that holds it, if it has room soon; and nothing is lost on the way."""

import asyncio
import signal
from typing import cast

import pytest

from qserve.errors import CallCancelled, ReplicaDied
from qserve.wire.messages import Outcome
from tests.support.calling import Caller, calling, within
from tests.support.replicas import NAME, Host, World
from tests.support.waiting import until


def put(caller: Caller, model: str, method: str = "look", *, name: str = "") -> "asyncio.Future[Outcome]":
    return caller.call(name or model, method, deployment=NAME, model=model)[1]


async def value(caller: Caller, future: "asyncio.Future[Outcome]") -> int:
    """Which process ran it."""
    pid = caller.value(await within(future))
    assert isinstance(pid, int)
    return pid


def held(world: World) -> dict[str, set[str]]:
    """Which replicas hold each model, as Redis has it."""
    raw = cast("dict[bytes, bytes]", world.redis.hgetall(world.keys.models(NAME)))
    return {field[2:].decode(): set(ids.decode().split()) for field, ids in raw.items() if field[:2] == b"m:"}


async def keep_home_busy(world: World, caller: Caller) -> "tuple[Host, asyncio.Future[Outcome]]":
    """Of two replicas with room for one call, the one that holds model a, and the call that runs there."""
    world.deploy("Zoo", max_concurrent_queries=1)
    await world.start(2)
    await value(caller, put(caller, "a"))
    busy = put(caller, "a", "stay", name="busy")
    await world.started("busy")
    return world.host_of("busy"), busy


async def test_calls_for_a_model_go_to_the_replica_that_holds_it(world: World) -> None:
    world.deploy("Zoo")
    await world.start(2)
    async with calling(world.settings, NAME) as caller:
        homes = {model: await value(caller, put(caller, model)) for model in "abcd"}
        for model in "abcd" * 10:
            assert await value(caller, put(caller, model)) == homes[model]

    assert sorted(homes.values()) == sorted([host.pid for host in world.hosts] * 2)  # where there is room for it
    assert [len(world.books.starts(f"load-{model}")) for model in "abcd"] == [1, 1, 1, 1]


async def test_a_new_model_that_many_ask_for_at_once_is_loaded_once(world: World) -> None:
    world.deploy("Zoo")
    await world.start(2)
    async with calling(world.settings, NAME) as caller:
        found = [await value(caller, each) for each in [put(caller, "a") for _ in range(8)]]

    assert len(set(found)) == 1
    assert len(world.books.starts("load-a")) == 1


async def test_a_model_that_leaves_is_no_longer_said_to_be_there(world: World) -> None:
    world.deploy("Zoo")
    (host,) = await world.start(1)
    async with calling(world.settings, NAME) as caller:
        for model in "abc":
            assert await value(caller, put(caller, model)) == host.pid
        await until(lambda: held(world) == {"b": {host.id}, "c": {host.id}})
        host.kill(signal.SIGTERM)
        await host.ended()

    assert world.redis.exists(world.keys.models(NAME)) == 0


async def test_a_call_does_not_wait_for_long_for_the_replica_that_holds_its_model(world: World) -> None:
    """Its place is taken by a call for another model, so the model is loaded a second time."""
    async with calling(world.settings, NAME) as caller:
        home, busy = await keep_home_busy(world, caller)
        late = put(caller, "a")

        assert await value(caller, late) != home.pid
        assert not busy.done()
        world.books.gate.open()
        assert await value(caller, busy) == home.pid


async def test_a_call_that_waits_for_its_replica_is_not_blamed_for_its_death(world: World) -> None:
    async with calling(world.settings, NAME) as caller:
        home, busy = await keep_home_busy(world, caller)
        waiting = put(caller, "a")
        await until(lambda: world.pending_for(home.id) == 2)
        home.kill()
        world.bury(home)

        with pytest.raises(ReplicaDied):
            await value(caller, busy)
        (other,) = {host.pid for host in world.hosts} - {home.pid}
        assert await value(caller, waiting) == other
        assert await value(caller, put(caller, "a")) == other
    await until(lambda: home.id not in str(held(world)))


async def test_a_call_withdrawn_while_it_waits_for_its_replica_never_runs(world: World) -> None:
    async with calling(world.settings, NAME) as caller:
        home, busy = await keep_home_busy(world, caller)
        pending, unwanted = caller.call("unwanted", "stay", deployment=NAME, model="a")
        await until(lambda: world.pending_for(home.id) == 2)
        caller.client.cancel(pending)
        with pytest.raises(CallCancelled):
            await value(caller, unwanted)
        await until(lambda: world.redis.xlen(world.keys.calls(NAME)) == 1)  # the other one has been withdrawn
        world.books.gate.open()

        await value(caller, busy)
        await until(lambda: world.redis.xlen(world.keys.calls(NAME)) == 0)
    assert world.books.starts("unwanted") == []


async def test_a_replica_that_leaves_gives_back_what_waits_there(world: World) -> None:
    async with calling(world.settings, NAME) as caller:
        home, busy = await keep_home_busy(world, caller)
        waiting = put(caller, "a")
        await until(lambda: world.pending_for(home.id) == 2)
        home.kill(signal.SIGTERM)

        assert await value(caller, waiting) != home.pid
        world.books.gate.open()
        assert await value(caller, busy) == home.pid
        assert await home.ended() == 0
