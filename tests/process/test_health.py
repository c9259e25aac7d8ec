"""What is noticed of replicas that are not well: failing and hanging checks, and event loops that stand still."""

import asyncio

import pytest

from qserve.broker.instance.reports import decode_infos
from qserve.errors import ReplicaDied
from qserve.wire.messages import Outcome
from qserve.wire.spec import SERVING, STALLED, UNHEALTHY, ReplicaInfo
from tests.support.calling import Caller, calling, within
from tests.support.replicas import NAME, Host, World
from tests.support.waiting import until

OFTEN = 0.05


def seen(world: World, host: Host) -> ReplicaInfo:
    """The replica as everybody sees it."""
    body = world.redis.hget(world.keys.replicas(NAME), host.id)
    assert isinstance(body, bytes)
    ((_, info),) = decode_infos({host.id.encode(): body}, ReplicaInfo)
    return info


def put(caller: Caller, method: str, argument: object) -> "asyncio.Future[Outcome]":
    return caller.call(argument, method, deployment=NAME)[1]


async def test_three_failed_checks_in_a_row_are_told_to_the_worker_and_shown(world: World) -> None:
    world.deploy("Patient", health_check_period_s=OFTEN)
    (host,) = await world.start()
    await until(lambda: len(world.books.starts("check")) > 3)
    assert host.reports("ill") == []

    world.books.say("ill")

    await until(lambda: host.reports("ill"))
    assert "check_health has failed 3 times in a row: RuntimeError: no connection" in host.reports("ill")[0]["error"]
    await until(lambda: seen(world, host).state == UNHEALTHY)
    assert "no connection" in seen(world, host).problem
    async with calling(world.settings, NAME) as caller:  # it serves until another one does
        assert caller.value(await within(put(caller, "pid", None))) == host.pid


async def test_a_check_that_fails_now_and_then_does_no_harm(world: World) -> None:
    world.deploy("Patient", health_check_period_s=OFTEN)
    (host,) = await world.start()
    world.books.say("ill")
    await until(lambda: "1 times in a row" in host.log.read_text())
    world.books.unsay("ill")
    await until(lambda: "succeeds again" in host.log.read_text() or host.reports("ill"))

    if not host.reports("ill"):  # else the machine was slow
        await until(lambda: seen(world, host).problem == "")
        assert seen(world, host).state == SERVING


async def test_another_period_takes_effect_in_the_running_replica(world: World) -> None:
    world.deploy("Patient", health_check_period_s=1000)
    (host,) = await world.start()
    assert len(world.books.starts("check")) == 1

    world.deploy("Patient", health_check_period_s=OFTEN)

    await until(lambda: len(world.books.starts("check")) > 3)
    assert set(world.books.starts("check")) == {host.pid}


async def test_a_replica_that_is_ill_from_the_start_counts_as_one_that_could_not_be_constructed(world: World) -> None:
    world.deploy("Patient")
    world.books.say("ill")
    host = Host(world.settings, world.folder)
    world.hosts.append(host)

    await until(lambda: host.reports("failed"))

    assert "no connection" in host.reports("failed")[0]["error"]


@pytest.mark.parametrize("code", ["Patient", "SyncPatient"])
async def test_a_check_that_hangs_ends_the_replica_and_is_named_in_the_error_of_its_calls(
    world: World, code: str
) -> None:
    world.deploy(code, health_check_period_s=OFTEN, health_check_timeout_s=0.5)
    (host,) = await world.start()
    async with calling(world.settings, NAME) as caller:
        world.books.say("stuck")
        call = put(caller, "wait", "unsafe") if code == "Patient" else None
        assert await host.ended() == 1
        world.books.unsay("stuck")
        assert "check_health has not returned within" in host.log.read_text()
        if call is not None:
            world.bury(host)
            await world.start()
            with pytest.raises(ReplicaDied, match="check_health has not returned within"):
                caller.value(await within(call))


async def test_a_check_that_waits_for_the_thread_of_a_long_call_does_not_hang(world: World) -> None:
    world.deploy("SyncPatient", health_check_period_s=OFTEN, health_check_timeout_s=0.2)
    (host,) = await world.start()
    async with calling(world.settings, NAME) as caller:
        call = put(caller, "wait", "long")
        await world.started("long")
        checks, handled = len(world.books.starts("check")), world.redis.hget(world.keys.heartbeats(NAME), host.id)
        assert handled is not None
        beats = int(handled)
        await until(lambda: int(world.redis.hget(world.keys.heartbeats(NAME), host.id) or 0) > beats + 3)
        assert len(world.books.starts("check")) == checks
        world.books.gate.open()
        assert caller.value(await within(call)) == "long"
        await until(lambda: len(world.books.starts("check")) > checks)


async def test_a_blocked_event_loop_is_told_with_its_place_and_named_in_the_error_of_the_calls_it_costs(
    world: World,
) -> None:
    world.settings = world.settings.model_copy(update={"max_loop_stall_s": 4.0})
    world.deploy()
    (host,) = await world.start()
    async with calling(world.settings, NAME) as caller:
        call = put(caller, "stall", 60)

        await until(lambda: seen(world, host).state == STALLED)

        assert host.process.poll() is None
        for text in (seen(world, host).problem, host.log.read_text()):
            assert "method stall has blocked the event loop" in text
            assert "replica_code.py, line" in text
            assert "in stall" in text
            assert "make it `def`" in text
        assert await host.ended() == 1
        world.bury(host)
        await world.start()
        with pytest.raises(ReplicaDied, match="method stall has blocked the event loop"):
            caller.value(await within(call))


async def test_a_loop_that_goes_on_is_no_longer_stalled(world: World) -> None:
    world.deploy()
    (host,) = await world.start()
    async with calling(world.settings, NAME) as caller:
        call = put(caller, "stall_until_told", "long")
        await until(lambda: seen(world, host).state == STALLED)
        world.books.gate.open()
        await within(call)
        await until(lambda: seen(world, host).state == SERVING)
        assert seen(world, host).problem == ""
