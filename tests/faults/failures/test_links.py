"""The line to Redis goes bad: half-open, cut, replies lost, requests lost, for a replica, a gateway or a handle."""

import asyncio

import pytest

from qserve.broker.link import REST_S
from qserve.errors import Indeterminate, ReplicaDied
from tests.faults.failures.systems import NAME, Stopwatch, ask, calling, outcome, put, system, value
from tests.support.calling import Caller
from tests.support.chosen_server import needs_one_server
from tests.support.slowness import patience
from tests.support.waiting import until

pytestmark = [pytest.mark.timeout(120), needs_one_server]  # a line leads to one server


async def test_a_replica_that_is_cut_off_loses_its_calls_and_its_late_results_are_dropped() -> None:
    async with system(dead_after_s=2.0, replicas=0, max_threads=2) as it, calling(it.settings) as caller:
        link = it.link()
        parted = await it.replica_behind(link)
        thread, unsafe = put(caller, "wait_on_thread", "thread")[1], put(caller, "wait", "unsafe")[1]
        safe = put(caller, "wait", "safe", safe=True)[1]
        await until(lambda: len(it.world.books.starts()) == 3)
        (other,) = await it.world.start()

        link.part()
        for future in (thread, unsafe):
            with pytest.raises(ReplicaDied, match="it may have run"):
                await value(caller, future)
        await it.world.started("safe", 2)
        await until(lambda: "fallen silent" in parted.log.read_text())
        starts = len(it.world.books.starts())
        link.heal()
        await asyncio.wait_for(serves(caller, parted.pid), patience(30))
        it.world.books.gate.open()

        assert await value(caller, safe) == "safe"
        await until(lambda: it.world.counter("late_results") >= 1)
        assert it.world.books.starts("safe") == [parted.pid, other.pid]
        assert len(it.world.books.starts("thread")) == len(it.world.books.starts("unsafe")) == 1
        assert starts == 4
        assert parted.process.poll() is None


async def test_a_replica_whose_connections_go_silent_for_good_makes_new_ones_and_serves_on() -> None:
    """No error ever comes, as where the host of the server has vanished and another one has taken its address."""
    async with system(dead_after_s=REST_S + 2, replicas=0) as it, calling(it.settings) as caller:
        link = it.link()
        replica = await it.replica_behind(link)
        await until(lambda: it.world.redis.pttl(it.world.keys.mover(NAME)) > 1000 * REST_S)  # it rests
        link.forget()
        assert await value(caller, put(caller, "pid", None)[1]) == replica.pid
        assert replica.process.poll() is None


async def serves(caller: Caller, pid: int) -> None:
    """Until that replica answers calls again."""

    async def answers() -> bool:
        return bool(await value(caller, put(caller, "pid", None)[1]) == pid)

    await until(answers)


async def test_a_half_open_line_of_a_gateway_and_a_handle_is_given_up_and_their_calls_end_once() -> None:
    async with system(replicas=1) as it:
        link = it.link()
        served = it.gateway(it.behind(link))
        async with calling(it.behind(link)) as caller, it.client(served) as http:
            call = put(caller, "wait", "call")[1]
            post = asyncio.create_task(http.post("/code"))
            await until(lambda: len(it.world.books.starts()) == 2)

            link.part()
            it.world.books.gate.open()
            await until(lambda: not caller.client.sender.is_open)
            link.heal()
            watch = Stopwatch()

            assert await value(caller, call) == "call"
            assert (await post).status_code == 200
            assert watch.seconds < patience(15)  # 10 where nothing else runs
            assert await ask(caller, "after") == "after"
            assert (await http.post("/code")).status_code == 200
        assert len(it.world.books.starts("call")) == 1


async def test_a_call_whose_confirmation_is_lost_is_found_and_runs_once() -> None:
    async with system(replicas=1) as it:
        link = it.link()
        async with calling(it.behind(link)) as caller:
            it.world.books.gate.open()
            link.lose_replies()
            pending, call = put(caller, "wait", "call")
            await it.world.started("call")
            assert pending.entry is None
            link.heal()

            assert await value(caller, call) == "call"
            assert await ask(caller, "after") == "after"
        assert it.world.books.starts("call") == [it.world.hosts[0].pid]


async def test_a_call_that_never_reached_redis_is_sent_again_if_it_is_safe() -> None:
    async with system(replicas=1) as it:
        link = it.link()
        async with calling(it.behind(link)) as caller:
            it.world.books.gate.open()
            link.lose_requests()
            unsafe, safe = put(caller, "wait", "unsafe")[1], put(caller, "wait", "safe", safe=True)[1]
            await asyncio.sleep(0.2)
            link.heal()

            assert isinstance(await outcome(unsafe), Indeterminate)
            assert await value(caller, safe) == "safe"
        assert it.world.books.starts("unsafe") == []
        assert len(it.world.books.starts("safe")) == 1


async def test_a_lost_call_to_an_idempotent_deployment_is_sent_again_whoever_made_it() -> None:
    async with system(replicas=1, idempotent=True) as it:
        link = it.link()
        async with calling(it.behind(link)) as caller:
            it.world.books.gate.open()
            assert await ask(caller, "before") == "before"

            link.lose_requests()
            call = put(caller, "wait", "call")[1]
            await asyncio.sleep(0.2)
            link.heal()

            assert await value(caller, call) == "call"
        assert len(it.world.books.starts("call")) == 1


async def test_what_was_delivered_into_a_dying_connection_runs_once() -> None:
    async with system(replicas=0) as it, calling(it.settings) as caller:
        link = it.link()
        host = await it.replica_behind(link)
        it.world.books.gate.open()
        assert await ask(caller, "before") == "before"

        link.lose_replies()
        lost = put(caller, "wait", "lost")[1]
        await until(lambda: it.world.pending_for(host.id) == 1)
        link.heal()

        assert await value(caller, lost) == "lost"
        assert it.world.books.starts("lost") == [host.pid]


async def test_calls_end_once_on_a_line_that_breaks_again_and_again() -> None:
    async with system(replicas=0) as it:
        link = it.link()
        await it.replica_behind(link)
        async with calling(it.behind(link)) as caller:
            it.world.books.gate.open()
            calls = []
            for number in range(200):
                calls.append((f"n{number}", put(caller, "wait", f"n{number}")[1]))
                await asyncio.sleep(0.01)
                if number % 40 == 20:
                    link.cut()
            for name, future in calls:
                end = await outcome(future)
                assert isinstance(end, Indeterminate) or caller.value(end) == name
            ran = [str(line.split()[1]) for line in it.world.books.notes.read() if line.startswith("START")]
            assert len(set(ran)) == len(ran)
