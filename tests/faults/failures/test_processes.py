"""Processes die at the worst moment, or have another idea of the time."""

import asyncio
import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from qserve.broker.server.clock import RedisClock
from qserve.errors import ReplicaDied
from qserve.settings import Settings, at_deployment
from qserve.wire.messages import PYTHON, Call, encode
from qserve_workers.calls.takeover import Takeover
from tests.faults.failures.systems import NAME, System, ask, calling, put, system, value
from tests.support.calling import deploy, serving
from tests.support.replicas import Host
from tests.support.slowness import patience
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(120)


async def replica_that_dies(it: System, monkeypatch: pytest.MonkeyPatch, failpoint: str) -> Host:
    monkeypatch.setenv("QSERVE_FAILPOINT", failpoint)
    (host,) = await it.world.start()
    monkeypatch.delenv("QSERVE_FAILPOINT")
    return host


@pytest.mark.parametrize(("point", "second"), [("taken", 1), ("run", 2), ("ran", 2), ("reply", 2)])
async def test_a_replica_that_dies_before_its_answer_has_left(
    point: str, second: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`second`: when the one that runs the safe call again passes the point with the unsafe one."""
    async with system(replicas=0) as it, calling(it.settings) as caller:
        doomed = await replica_that_dies(it, monkeypatch, f"{point}:1")
        it.world.books.gate.open()
        safe = put(caller, "wait", "safe", safe=True)[1]
        await doomed.ended()
        it.world.bury(doomed)
        doomed = await replica_that_dies(it, monkeypatch, f"{point}:{second}")

        assert await value(caller, safe) == "safe"
        unsafe = put(caller, "wait", "unsafe")[1]
        await doomed.ended()
        await it.world.start()
        it.world.bury(doomed)

        with pytest.raises(ReplicaDied, match="it may have run"):
            await value(caller, unsafe)
        assert len(it.world.books.starts("unsafe")) <= 1
        assert it.depth() == 0


@pytest.mark.parametrize("point", ["reply-sent", "replied"])
async def test_a_replica_that_dies_after_its_answer_has_left(point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer, acknowledgement and removal are one step: what is answered never runs again."""
    async with system(replicas=0) as it, calling(it.settings) as caller:
        doomed = await replica_that_dies(it, monkeypatch, f"{point}:1")
        it.world.books.gate.open()
        call = put(caller, "wait", "call", safe=True)[1]
        await doomed.ended()
        it.world.bury(doomed)
        await it.world.start()

        assert await value(caller, call) == "call"
        assert await ask(caller, "after") == "after"
        assert it.world.books.starts("call") == [doomed.pid]


async def test_a_gateway_that_is_killed_leaves_nothing_behind_and_its_successor_gets_no_answer_of_its() -> None:
    async with system(replicas=1) as it:
        served = it.gateway()
        redis, keys = it.world.redis, it.world.keys
        async with it.client(served) as http:
            lost = [asyncio.create_task(http.post("/code")) for _ in range(3)]
            await until(lambda: len(it.world.books.starts()) == 3)
            served.process.kill()
            for request in lost:
                with pytest.raises(httpx.TransportError):
                    await request
        successor = it.gateway()
        async with it.client(successor) as http:
            it.world.books.gate.open()
            answers = [await http.post("/code") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200] * 3
        await until(lambda: it.depth() == 0)

        left = [*redis.scan_iter(keys.inbox("*").replace("*", "") + "*"), *redis.scan_iter(keys.alive("") + "*")]
        assert left
        assert all(0 < int(redis.pttl(key)) <= 60_000 for key in left)
        assert it.world.counter("rejected_frames") == 0


async def test_a_host_with_another_time_serves_like_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() + 3600\n")
    async with system(dead_after_s=2.0, replicas=1) as it, calling(it.settings) as caller:
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        await it.world.start()
        calls = [put(caller, "wait", f"n{n}", timeout_s=30)[1] for n in range(10)]
        await until(lambda: len(it.world.books.starts()) == len(calls))
        while len(set(it.world.books.starts())) < 2:  # on a busy machine one of them may take all at first
            calls.append(put(caller, "wait", f"n{len(calls)}", timeout_s=30)[1])
            await until(lambda: len(it.world.books.starts()) == len(calls))
        await asyncio.sleep(patience(2.5))  # whoever is taken for dead is so by now
        it.world.books.gate.open()

        assert [await value(caller, call) for call in calls] == [f"n{n}" for n in range(len(calls))]
        assert it.world.counter("taken_over") == 0


@pytest.mark.parametrize("jump_ms", [3_600_000, -3_600_000])
async def test_calls_from_before_and_after_a_jump_of_redis_clock_run(jump_ms: int) -> None:
    async with system(replicas=1) as it, calling(it.settings) as caller:
        it.world.books.gate.open()
        assert await ask(caller, "before") == "before"

        # To callers and entries it is the same whether the server's clock jumps or what they know of it.
        caller.client.redis_clock._offset_ms = (caller.client.redis_clock._offset_ms or 0) - jump_ms
        assert await ask(caller, "after") == "after"

        it.world.redis.xtrim(it.world.keys.calls(NAME), maxlen=0)
        payload = caller.codec.pack_call(("future",), {})
        call = Call("x" * 32, NAME, caller.client.id, 30_000, PYTHON, "wait", False, payload)
        frame = it.world.signer.seal(encode(call))
        entry = f"{int(time.time() * 1000) + abs(jump_ms)}-0"  # put while the clock was ahead
        it.world.redis.xadd(it.world.keys.calls(NAME), {"r": call.id, "f": "", "d": frame}, id=entry)
        await it.world.started("future")
        assert await ask(caller, "later") == "later"


async def test_a_server_whose_clock_jumps_forth_again_and_again_forgets_nobody_for_long() -> None:
    """All that lives expires at such a jump; answers to callers who seem dead are kept for 6 s only."""
    async with system(replicas=1) as it, calling(it.settings) as caller:
        it.world.books.gate.open()
        key = it.world.keys.alive(caller.client.id)
        for _ in range(4):
            it.world.redis.delete(key)
            await until(lambda: it.world.redis.exists(key), 2.5)
        assert await ask(caller, "after") == "after"


class ClockOnly:
    """A connection to a server that knows the time."""

    def __init__(self) -> None:
        self.offset_s = 0.0

    async def call(self, _command: str) -> tuple[int, int]:
        return int(time.time() + self.offset_s), 0


async def test_what_was_put_before_a_jump_has_no_age() -> None:
    clock, server = RedisClock(), ClockOnly()
    await clock.sample(server)  # type: ignore[arg-type]
    put_at = int(time.time() * 1000)
    assert clock.age_ms(put_at - 5000) == pytest.approx(5000, abs=1500)

    server.offset_s = 3600
    await clock.sample(server)  # type: ignore[arg-type]

    assert clock.age_ms(put_at) == 0
    assert clock.age_ms(put_at + 3_600_000 + 2000) < 2000


async def test_a_call_that_takes_longer_than_deaths_do_runs_once() -> None:
    """Nothing but silence counts; the other replica freezes meanwhile, and wakes up with old observations."""
    async with system(dead_after_s=1.5) as it, calling(it.settings) as caller:
        long = put(caller, "wait", "long")[1]
        await it.world.started("long")
        (other,) = [host for host in it.world.hosts if host is not it.world.host_of("long")]
        os.kill(other.pid, signal.SIGSTOP)
        await asyncio.sleep(patience(2.5))
        os.kill(other.pid, signal.SIGCONT)
        await asyncio.sleep(0.5)
        it.world.books.gate.open()

        assert await value(caller, long) == "long"
        assert len(it.world.books.starts("long")) == 1


async def test_what_a_killed_worker_told_is_forgotten_and_what_live_ones_tell_stays(settings: Settings) -> None:
    spec = deploy(settings)
    async with serving(settings, spec) as (consumer, _):
        here = at_deployment(settings, spec.name)  # a node says in each shard of a cluster that it lives
        takeover, sender, keys = Takeover(here, consumer, "me"), consumer.link.sender, here.keys
        for node in ("killed", "alive", "late"):
            await sender.call("HSET", keys.workers(spec.name), node, b"told")
        await sender.call("SET", keys.alive("alive"), 1)

        for look in range(3):
            assert len(await sender.call("HKEYS", keys.workers(spec.name))) == 3
            if look == 2:  # it lives after all: its word came late
                await sender.call("SET", keys.alive("late"), 1)
            await takeover.forget_workers(sender)

        assert await sender.call("HKEYS", keys.workers(spec.name)) == [b"alive", b"late"]
