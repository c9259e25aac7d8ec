"""Replicas and the GPUs of their machine: who gets which, who waits, and what is said of it."""

from pathlib import Path

import pytest

from qserve.broker.instance.reports import decode_infos
from qserve.wire.spec import SERVING, STARTING, ReplicaInfo
from tests.support.calling import calling
from tests.support.replicas import NAME, Host, World
from tests.support.waiting import until


@pytest.fixture
def machine(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A machine with two GPUs."""
    monkeypatch.setenv("QSERVE_RUNTIME_DIR", str(tmp_path))
    world.settings = world.settings.model_copy(update={"gpus": "4,6"})
    return world


def seen(world: World, host: Host) -> ReplicaInfo | None:
    """The replica as everybody sees it."""
    body = world.redis.hget(world.keys.replicas(NAME), host.id) if host.state else None
    found = decode_infos({host.id.encode(): body} if isinstance(body, bytes) else {}, ReplicaInfo)
    return next((info for _, info in found), None)


def gpus(world: World, host: Host) -> str | None:
    info = seen(world, host)
    return None if info is None else info.gpus


def problem(world: World, host: Host) -> str:
    info = seen(world, host)
    return "" if info is None else info.problem


async def test_each_replica_has_a_gpu_before_its_code_is_imported_and_one_that_finds_none_waits(machine: World) -> None:
    machine.deploy(num_gpus=1.0)
    (first,) = await machine.start()
    (second,) = await machine.start()
    assert (gpus(machine, first), gpus(machine, second)) == ("4", "6")
    async with calling(machine.settings) as caller:
        found = {await caller.ask(None, "gpus", deployment=NAME) for _ in range(20)}
        assert found <= {"4", "6"}

    third = Host(machine.settings, machine.folder)
    machine.hosts.append(third)
    await until(lambda: "waits for" in problem(machine, third))
    assert "waits for 1 GPU: 2 of 2 in use on " in problem(machine, third)
    assert len(third.reports("state")) >= 1

    first.kill()
    await third.reached(SERVING)
    assert (gpus(machine, third), problem(machine, third)) == ("4", "")


async def test_two_halves_are_on_one_gpu(machine: World) -> None:
    machine.deploy(num_gpus=0.5)
    hosts = await machine.start(2)
    assert [gpus(machine, host) for host in hosts] == ["4 (0.5)"] * 2
    async with calling(machine.settings) as caller:
        assert await caller.ask(None, "gpus", deployment=NAME) == "4"


async def test_a_replica_that_waits_can_be_told_to_leave(machine: World) -> None:
    machine.deploy(num_gpus=2.0)
    await machine.start()
    waiting = Host(machine.settings, machine.folder)
    machine.hosts.append(waiting)
    await until(lambda: waiting.state == STARTING)
    waiting.kill(15)
    assert await waiting.ended() == 0


async def test_more_than_the_machine_has_is_told_and_not_waited_for(machine: World) -> None:
    machine.deploy(num_gpus=3.0)
    host = Host(machine.settings, machine.folder)
    machine.hosts.append(host)
    await until(lambda: host.reports("failed"))
    assert "a replica needs 3 GPUs, and on this node it has 2: 4, 6" in host.reports("failed")[0]["error"]
