"""Redis itself freezes, dies, forgets, fills up, or refuses to write: what becomes of calls, by HTTP and by handles."""

import asyncio
from typing import Any

import pytest
import redis

from qserve.errors import BrokerUnavailable, GetTimeoutError, Indeterminate
from qserve.wire.messages import ERROR, Reply, decode_error
from tests.faults.failures.systems import NAME, PATIENCE_S, Stopwatch, System, ask, calling, outcome, put, system, value
from tests.support.chosen_server import needs_one_server
from tests.support.servers import Server
from tests.support.slowness import patience
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(120)


async def test_nobody_is_dead_and_nothing_expired_runs_after_a_pause_longer_than_deaths_take() -> None:
    async with system(dead_after_s=2.0) as it, calling(it.settings) as caller:
        running = [put(caller, "wait", f"running{n}")[1] for n in range(4)]
        await until(lambda: len(it.world.books.starts()) == 4)

        it.server.freeze()
        _, expired = put(caller, "wait", "expired", timeout_s=1)
        watch = Stopwatch()
        assert isinstance(await outcome(expired), GetTimeoutError | Indeterminate)
        assert watch.seconds < patience(5)
        await asyncio.sleep(max(0, patience(4.5) - watch.seconds))  # what others would take for death, twice
        it.server.thaw()

        it.world.books.gate.open()
        assert [await value(caller, future) for future in running] == [f"running{n}" for n in range(4)]
        assert await ask(caller, "after") == "after"
        assert it.world.counter("taken_over") == 0
        assert it.world.books.starts("expired") == []
        assert all(len(it.world.books.starts(f"running{n}")) == 1 for n in range(4))


async def test_calls_outlive_a_server_that_is_killed_and_keeps_its_data() -> None:
    async with system(replicas=1, max_concurrent_queries=2) as it, calling(it.settings) as caller:
        served = it.gateway()
        async with it.client(served) as http:
            calls = [put(caller, "wait", name)[1] for name in ("one", "two", "queued")]
            post = asyncio.create_task(http.post("/code"))
            await until(lambda: len(it.world.books.starts()) == 2 and it.depth() == 4)

            it.server.kill()
            await until(lambda: not caller.client.sender.is_open)
            watch = Stopwatch()
            refused = await http.post("/code")
            assert (refused.status_code, refused.text[:17]) == (503, "BrokerUnavailable")
            assert int(refused.headers["retry-after"]) >= 1
            assert isinstance(await outcome(put(caller, "wait", "refused")[1]), BrokerUnavailable)
            assert watch.seconds < patience(10)
            it.world.books.gate.open()
            it.server.start()

            assert [await value(caller, call) for call in calls] == ["one", "two", "queued"]
            assert (await post).status_code == 200
        assert it.world.books.starts("refused") == []
        assert len(it.world.books.starts()) == 4
        assert it.world.counter("taken_over") == 0


async def test_a_server_that_forgot_everything_is_told_what_is_deployed() -> None:
    async with system(keeps_data=False) as it, calling(it.settings) as caller:
        served = it.gateway()
        async with it.client(served) as http:
            unsafe, safe = put(caller, "wait", "unsafe")[1], put(caller, "wait", "safe", safe=True)[1]
            get, post = asyncio.create_task(http.get("/code")), asyncio.create_task(http.post("/code"))
            await until(lambda: len(it.world.books.starts()) == 4)
            pids = [host.pid for host in it.world.hosts]

            it.server.kill()
            it.server.start()
            watch = Stopwatch()

            assert isinstance(await outcome(unsafe), Indeterminate)
            response = await post
            assert (response.status_code, response.text[:13]) == (502, "Indeterminate")
            assert watch.seconds < patience(10)  # 5 where nothing else runs
            it.world.books.gate.open()
            assert await value(caller, safe) == "safe"
            assert (await get).status_code == 200
            assert (await http.post("/code")).status_code == 200
            assert await ask(caller, "after") == "after"
        assert [host.process.poll() for host in it.world.hosts] == [None, None]
        assert {*it.world.books.starts()} <= {*pids}
        assert len(it.world.books.starts("unsafe")) == 1
        assert it.world.redis.hget(it.world.keys.meta(NAME), "gen") == b"1"


async def test_a_caller_that_speaks_again_after_a_server_forgot_it_is_answered_soon() -> None:
    async with system(replicas=1) as it, calling(it.settings) as caller:
        _, running = put(caller, "wait", "running")
        await it.world.started("running")
        alive = it.world.keys.alive(caller.client.id)
        it.world.redis.delete(alive)

        it.world.books.gate.open()
        await asyncio.sleep(0.5)  # the answer has found nobody
        it.world.redis.set(alive, "1", px=15_000)
        watch = Stopwatch()

        assert await value(caller, running) == "running"
        assert watch.seconds < patience(3)


async def test_strict_replicas_do_not_run_unsafe_calls_of_before_a_restart() -> None:
    async with (
        system(replicas=1, strict=True, max_concurrent_queries=1) as it,
        calling(it.settings) as caller,
    ):
        running = put(caller, "wait", "running")[1]
        await it.world.started("running")
        unsafe, safe = put(caller, "wait", "unsafe")[1], put(caller, "wait", "safe", safe=True)[1]
        last = put(caller, "wait", "last")[1]
        await until(lambda: it.depth() == 4)

        it.server.kill()
        it.server.start()
        await until(lambda: it.world.hosts[0].log.read_text().count("connected to Redis again") >= 2)
        it.world.books.gate.open()

        assert await value(caller, running) == "running"
        for each in (unsafe, last):
            told = await outcome(each)
            assert isinstance(told, Reply)
            assert (told.kind, decode_error(told.payload).code) == (ERROR, "Indeterminate")
        assert await value(caller, safe) == "safe"
        assert await ask(caller, "after") == "after"
        assert it.world.books.starts("unsafe") == it.world.books.starts("last") == []


def fill(it: System) -> None:
    it.world.redis.set("ballast", bytes(8 * 1024 * 1024))
    it.world.redis.config_set("maxmemory", 4 * 1024 * 1024)


def refuse_writes(it: System) -> None:
    assert isinstance(it.server, Server)
    (it.server.folder / "dump.rdb").mkdir()  # so no snapshot can be written
    it.world.redis.config_set("save", "3600 1")
    it.world.redis.bgsave()


def make_room(it: System) -> None:
    it.world.redis.config_set("maxmemory", 0)


def allow_writes(it: System) -> None:
    it.world.redis.config_set("stop-writes-on-bgsave-error", "no")


@needs_one_server
@pytest.mark.parametrize(("harm", "heal", "answers"), [(fill, make_room, True), (refuse_writes, allow_writes, False)])
async def test_a_server_that_takes_no_more_data_refuses_new_calls_and_harms_no_other(
    harm: Any, heal: Any, answers: bool
) -> None:
    """Beyond maxmemory, running calls are answered meanwhile; where nothing can be written, afterwards."""
    async with system(dead_after_s=2.0) as it, calling(it.settings) as caller:
        served = it.gateway()
        async with it.client(served) as http:
            running = [put(caller, "wait", f"running{n}")[1] for n in range(2)]
            await until(lambda: len(it.world.books.starts()) == 2)

            harm(it)
            await refused_somehow(it)
            refused = await http.post("/code")
            assert (refused.status_code, refused.text[:17]) == (503, "BrokerUnavailable")
            assert int(refused.headers["retry-after"]) >= 1
            assert isinstance(await outcome(put(caller, "wait", "refused")[1]), BrokerUnavailable)
            await asyncio.sleep(patience(3))  # deaths would be seen by now
            it.world.books.gate.open()
            if answers:
                assert [await value(caller, future) for future in running] == ["running0", "running1"]
            heal(it)

            watch = Stopwatch()
            assert [await value(caller, future) for future in running] == ["running0", "running1"]
            assert (await http.post("/code")).status_code == 200
            assert watch.seconds < patience(PATIENCE_S)
        assert it.world.counter("taken_over") == 0
        assert len(it.world.books.starts("running0")) == len(it.world.books.starts("running1")) == 1


async def refused_somehow(it: System) -> None:
    def refuses() -> bool:
        try:
            it.world.redis.set("probe", bytes(64 * 1024))
        except redis.exceptions.ResponseError:
            return True
        return False

    await until(refuses)
