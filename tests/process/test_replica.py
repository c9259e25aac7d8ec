"""Replicas as processes of their own, under real signals: what becomes of the calls they have."""

import asyncio
import os
import secrets
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from qserve.broker.history.troubles import read_troubles
from qserve.broker.keys import Keys
from qserve.errors import (
    CallCancelled,
    FrameRejected,
    PoisonCall,
    ReplicaDied,
    ResultNotSerializable,
    ResultTooLarge,
    TaskError,
)
from qserve.settings import Settings
from qserve.wire.messages import HTTP, PYTHON, Call, HttpRequest, Outcome, Reply, Signer, decode_http_response, encode
from tests.support.calling import Caller, calling, within
from tests.support.chosen_server import needs_one_server
from tests.support.replicas import NAME, World
from tests.support.slowness import patience
from tests.support.waiting import until


def put(caller: Caller, method: str, name: object, *, safe: bool = False) -> "asyncio.Future[Outcome]":
    return caller.call(name, method, deployment=NAME, safe=safe)[1]


async def value(caller: Caller, future: "asyncio.Future[Outcome]") -> object:
    return caller.value(await within(future))


async def takes_no_more(caller: Caller) -> None:
    """Put calls until one is left in the queue: a signal is noted some time after it was sent."""
    while (await asyncio.wait([put(caller, "pid", None)], timeout=patience(0.5)))[0]:
        pass


def readers(world: World) -> int:
    """How many connections the server has on which somebody reads calls."""
    clients: Any = world.redis.client_list()
    return sum(each["cmd"] == "xreadgroup" for each in clients)


class TestSlots:
    async def test_a_burst_spreads_over_the_replicas(self, world: World) -> None:
        world.deploy(max_concurrent_queries=100)
        await world.start(2)
        async with calling(world.settings, NAME) as caller:
            futures = [put(caller, "wait", str(n)) for n in range(20)]
            await until(lambda: len(world.books.starts()) == 20)
            world.books.gate.open()
            assert [await value(caller, future) for future in futures] == [str(n) for n in range(20)]

        assert len(set(world.books.starts())) == 2  # how evenly is for the machine's scheduler to say

    async def test_a_replica_whose_thread_is_busy_leaves_calls_to_one_that_is_free(self, world: World) -> None:
        world.deploy("OneByOne")
        await world.start(2)
        async with calling(world.settings, NAME) as caller:
            slow = put(caller, "", "slow")
            await world.started("slow")

            others = [put(caller, "", str(n)) for n in range(6)]
            assert [await value(caller, future) for future in others] == [str(n) for n in range(6)]

            busy = world.host_of("slow").pid
            assert all(world.books.starts(str(n)) != [busy] for n in range(6))
            world.books.gate.open()
            assert await value(caller, slow) == "slow"

    async def test_a_standby_replica_takes_no_calls_until_it_is_told_to(self, world: World) -> None:
        world.deploy()
        (host,) = await world.start(1, "standby")
        async with calling(world.settings, NAME) as caller:
            future = put(caller, "pid", None)
            await until(lambda: world.redis.xlen(world.keys.calls(NAME)) == 1)
            assert world.pending_for(host.id) == 0

            host.kill(signal.SIGUSR2)

            assert await value(caller, future) == host.pid

    async def test_a_call_to_itself_that_nobody_waits_for_is_left_alone(self, world: World) -> None:
        world.deploy("Firing")
        (host,) = await world.start()
        async with calling(world.settings, NAME) as caller:
            first = put(caller, "", "first")
            await world.started("after")
            beats = world.redis.hget(world.keys.heartbeats(NAME), host.id)
            assert beats is not None
            await until(lambda: int(world.redis.hget(world.keys.heartbeats(NAME), host.id) or 0) > int(beats) + 4)
            world.books.gate.open()

            assert await value(caller, first) == "first"
            await world.started("fired")


class TestDeath:
    @needs_one_server  # asks one server who reads there
    async def test_a_process_that_it_forked_and_that_outlives_it_reads_no_calls(self, world: World) -> None:
        """On a connection that it held open the server would give out one more, which nobody would run for a minute."""
        world.deploy()
        (host,) = await world.start()
        async with calling(world.settings, NAME) as caller:
            child = await caller.ask(None, "leave_a_child", deployment=NAME)
            assert isinstance(child, int)
            try:
                await until(lambda: readers(world) == 1)
                host.kill()
                await until(lambda: readers(world) == 0)
            finally:
                os.kill(child, signal.SIGKILL)

    @pytest.mark.parametrize("with_tombstone", [True, False])
    async def test_calls_of_a_killed_replica_run_again_only_if_that_is_safe(
        self, world: World, with_tombstone: bool
    ) -> None:
        """Its worker tells at once; where the whole host is gone, the heartbeat that stands still does."""
        world.deploy()
        (first,) = await world.start()
        async with calling(world.settings, NAME) as caller:
            unsafe, safe = put(caller, "wait", "unsafe"), put(caller, "wait", "safe", safe=True)
            page, request = asyncio.get_running_loop().create_future(), http_request()
            caller.client.put(
                caller.client.prepare(
                    NAME,
                    kind=HTTP,
                    method="",
                    payload=encode(request),
                    timeout_s=60,
                    safe=True,
                    on_outcome=page.set_result,
                )
            )
            await until(lambda: len(world.books.starts()) == 3)
            (second,) = await world.start()

            first.kill()
            if with_tombstone:
                world.bury(first)

            with pytest.raises(ReplicaDied, match="it may have run"):
                await value(caller, unsafe)
            await until(lambda: len(world.books.starts()) == 5)  # together, not one after the other
            world.books.gate.open()
            assert await value(caller, safe) == "safe"
            response = await within(page)
            assert isinstance(response, Reply)
            assert decode_http_response(response.payload).status == 200

        assert world.books.starts("unsafe") == [first.pid]
        assert world.books.starts("safe") == [first.pid, second.pid]
        assert world.books.starts("http") == [first.pid, second.pid]
        await until(lambda: not world.redis.hexists(world.keys.heartbeats(NAME), first.id))

        def troubles() -> list[tuple[str, str, str]]:
            found = read_troubles(world.redis, world.keys, [NAME])
            return sorted((note.what, note.method, note.request) for _, _, note in found)

        await until(lambda: len(troubles()) == 3)
        assert troubles() == [("failed", "wait", ""), ("lost", "", request.request_id), ("lost", "wait", "")]

    @pytest.mark.parametrize("beside", ["safe", "unsafe"])
    async def test_a_safe_call_starts_again_within_half_a_second_beside_calls_that_go_on(
        self, world: World, beside: str
    ) -> None:
        """A replica whose calls must not run twice leaves it to others for a moment, in vain if there are none."""
        world.deploy()
        async with calling(world.settings, NAME) as caller:
            safe = put(caller, "wait", "safe", safe=True)
            await world.gave_to_ghost(1)
            await world.start()
            busy = put(caller, "wait", "busy", safe=beside == "safe")
            await world.started("busy")

            died_at = time.monotonic()
            world.ghost_dies()
            await world.started("safe")

            assert time.monotonic() - died_at < patience(0.5)
            assert world.books.ended() == []
            world.books.gate.open()
            assert [await value(caller, future) for future in (safe, busy)] == ["safe", "busy"]

    async def test_the_last_chance_of_a_call_is_the_successors_and_no_other_replica_waits_for_it(
        self, world: World
    ) -> None:
        world.deploy()
        async with calling(world.settings, NAME) as caller:
            suspect = put(caller, "wait", "suspect", safe=True)
            await world.gave_to_ghost(1, starts=2)
            (busy,) = await world.start()
            (successor,) = await world.start(1, "standby")
            long = put(caller, "wait", "long")
            await world.started("long")

            world.ghost_dies()
            assert await value(caller, put(caller, "pid", None)) == busy.pid  # it reads on
            successor.kill(signal.SIGUSR2)
            await world.started("suspect")

            assert world.host_of("suspect") is successor
            assert await value(caller, put(caller, "pid", None)) == busy.pid  # the other one has its last chance alone
            world.books.gate.open()
            assert [await value(caller, future) for future in (suspect, long)] == ["suspect", "long"]

    async def test_a_thread_that_becomes_free_takes_calls_of_the_dead_before_new_ones(self, world: World) -> None:
        world.deploy("OneByOne")
        async with calling(world.settings, NAME) as caller:
            unsafe, safe = put(caller, "", "unsafe"), put(caller, "", "safe", safe=True)
            await world.gave_to_ghost(2)
            (host,) = await world.start()
            slow = put(caller, "", "slow")
            await world.started("slow")
            new = [put(caller, "", f"new{n}") for n in range(3)]
            world.ghost_dies()
            with pytest.raises(ReplicaDied):
                await value(caller, unsafe)
            await until(lambda: "took over 1 calls" in host.log.read_text())

            world.books.gate.open()

            outcomes = [await value(caller, future) for future in (slow, safe, *new)]
        assert outcomes == ["slow", "safe", "new0", "new1", "new2"]
        started = [line.split()[1] for line in world.books.notes.read()]
        assert started == outcomes

    async def test_callers_of_unsafe_calls_are_told_by_a_replica_that_does_not_serve_yet(self, world: World) -> None:
        world.deploy()
        (first,) = await world.start()
        await world.start(1, "standby")
        async with calling(world.settings, NAME) as caller:
            unsafe = put(caller, "wait", "unsafe")
            await world.started("unsafe")
            first.kill()
            world.bury(first)

            with pytest.raises(ReplicaDied):
                await value(caller, unsafe)

    async def test_a_call_that_kills_three_replicas_is_given_up_and_its_mates_are_unharmed(self, world: World) -> None:
        world.deploy(max_concurrent_queries=100)
        await world.start()
        async with calling(world.settings, NAME) as caller:
            poison = put(caller, "die", "poison", safe=True)
            mates = [put(caller, "wait", f"mate{n}", safe=True) for n in range(3)]
            await until(lambda: len(world.books.starts()) == 4)
            world.books.fuse.open()
            for victim in range(3):
                await world.started("poison", victim + 1)
                await world.hosts[victim].ended()
                world.bury(world.hosts[victim])
                await world.start()

            with pytest.raises(PoisonCall, match="Task failed with 2 retries"):
                await value(caller, poison)
            world.books.gate.open()
            assert [await value(caller, mate) for mate in mates] == ["mate0", "mate1", "mate2"]

        assert len(world.books.starts("poison")) == 3
        (letter,) = world.letters()
        assert b"Task failed with 2 retries" in letter[b"err"]
        await until(lambda: world.counter("dead_letters") == 1)
        assert world.hosts[-1].process.poll() is None

    async def test_a_frozen_replica_that_wakes_up_answers_nothing_twice(self, world: World) -> None:
        world.deploy(max_threads=2)
        (first,) = await world.start()
        async with calling(world.settings, NAME) as caller:
            thread, unsafe = put(caller, "wait_on_thread", "thread"), put(caller, "wait", "unsafe")
            safe = put(caller, "wait", "safe", safe=True)
            await until(lambda: len(world.books.starts()) == 3)
            await world.start()

            first.kill(signal.SIGSTOP)

            for future in (thread, unsafe):
                with pytest.raises(ReplicaDied):
                    await value(caller, future)
            await world.started("safe", 2)
            world.books.gate.open()
            assert await value(caller, safe) == "safe"
            first.kill(signal.SIGCONT)

            # the one on a thread could not be stopped: its result is late
            await until(lambda: "thread" in world.books.ended())
            await until(lambda: world.counter("late_results") >= 1)
            assert await value(caller, put(caller, "wait", "after")) == "after"
        assert world.redis.xlen(world.keys.calls(NAME)) == 0

    async def test_a_replica_whose_event_loop_hangs_ends_and_shows_where(self, world: World) -> None:
        world.settings = world.settings.model_copy(update={"max_loop_stall_s": 1.0})
        world.deploy()
        (host,) = await world.start()
        async with calling(world.settings, NAME) as caller:
            put(caller, "stall", 60)
            assert await host.ended() == 1

        assert "in stall" in host.log.read_text()


class TestLeaving:
    async def test_a_drained_replica_finishes_what_it_started_and_leaves_the_rest(self, world: World) -> None:
        world.deploy()
        (first,) = await world.start()
        async with calling(world.settings, NAME) as caller:
            running = [put(caller, "wait", f"running{n}") for n in range(2)]
            await until(lambda: len(world.books.starts()) == 2)
            first.kill(signal.SIGTERM)
            await first.reached("DRAINING")
            queued = [put(caller, "wait", f"queued{n}") for n in range(3)]
            await until(lambda: world.redis.xlen(world.keys.calls(NAME)) == 5)

            world.books.gate.open()

            assert [await value(caller, future) for future in running] == ["running0", "running1"]
            assert await first.ended() == 0
            (second,) = await world.start()
            assert [await value(caller, future) for future in queued] == ["queued0", "queued1", "queued2"]

        assert sorted(world.books.starts()) == sorted([first.pid] * 2 + [second.pid] * 3)
        assert world.redis.hkeys(world.keys.heartbeats(NAME)) == [second.id.encode()]

    async def test_a_destructor_has_what_is_left_of_the_grace_time(self, world: World) -> None:
        world.deploy("Parting", graceful_shutdown_timeout_s=300.0)
        (host,) = await world.start()

        def beats() -> int:
            return int(world.redis.hget(world.keys.heartbeats(NAME), host.id) or 0)

        host.kill(signal.SIGTERM)
        await world.started("goodbye")
        beats_before = beats()
        await until(lambda: beats() > beats_before + 15)  # 3 s
        world.books.gate.open()

        assert await host.ended() == 0
        assert world.books.ended() == ["goodbye"]

    async def test_what_waits_to_run_again_is_handed_on_by_a_replica_that_leaves(self, world: World) -> None:
        world.deploy()
        async with calling(world.settings, NAME) as caller:
            suspect = put(caller, "wait", "suspect", safe=True)
            await world.gave_to_ghost(1, starts=2)
            (first,) = await world.start()
            put(caller, "wait", "busy")
            await world.started("busy")
            world.ghost_dies()
            await until(lambda: world.pending_for(first.id) == 2)

            first.kill(signal.SIGTERM)
            await first.reached("DRAINING")
            world.books.gate.open()
            assert await first.ended() == 0

            (second,) = await world.start()
            assert await value(caller, suspect) == "suspect"

        assert world.books.starts("suspect") == [second.pid]

    async def test_a_new_config_waits_for_the_calls_in_flight(self, world: World) -> None:
        world.deploy(user_config=world.codec.pack("old"))
        (host,) = await world.start()
        async with calling(world.settings, NAME) as caller:
            before = put(caller, "get_config", "before")
            await world.started("before")
            world.deploy(user_config=world.codec.pack("new"))
            await until(lambda: host.reports("asks_to_apply"))
            host.kill(signal.SIGUSR2)
            await until(lambda: world.redis.xlen(world.keys.calls(NAME)) == 1)

            world.books.gate.open()

            assert await value(caller, before) == ["old", "old"]
            await until(lambda: host.reports("applied"))
            assert await value(caller, put(caller, "get_config", "after")) == ["new", "new"]

    async def test_a_new_config_waits_no_longer_than_the_grace_time_and_can_be_tried_again(self, world: World) -> None:
        world.deploy(user_config=world.codec.pack("old"), graceful_shutdown_timeout_s=0.0)
        (host,) = await world.start()
        async with calling(world.settings, NAME) as caller:
            stuck = put(caller, "get_config", "stuck")
            await world.started("stuck")
            world.deploy(user_config=world.codec.pack("new"), graceful_shutdown_timeout_s=0.0)
            await until(lambda: host.reports("asks_to_apply"))
            host.kill(signal.SIGUSR2)

            (failed,) = await until(lambda: host.reports("reconfigure_failed"))
            assert failed["generation"] == 2
            assert "still runs calls that began under it: get_config, for 1 s" in failed["error"]
            assert await value(caller, put(caller, "pid", None)) == host.pid  # it serves on

            world.books.gate.open()
            assert await value(caller, stuck) == ["old", "old"]
            world.deploy(user_config=world.codec.pack("new"), graceful_shutdown_timeout_s=60.0)
            await until(lambda: len(host.reports("asks_to_apply")) == 2)
            host.kill(signal.SIGUSR2)
            await until(lambda: host.reports("applied"))
            assert await value(caller, put(caller, "get_config", "after")) == ["new", "new"]

    async def test_a_reconfigure_that_takes_too_long_has_failed(self, world: World) -> None:
        world.deploy("Stuck", user_config=world.codec.pack("old"))
        (host,) = await world.start()
        async with calling(world.settings, NAME) as caller:
            world.deploy("Stuck", user_config=world.codec.pack("new"), initialization_timeout_s=0.1)
            await until(lambda: host.reports("asks_to_apply"))
            host.kill(signal.SIGUSR2)

            (failed,) = await until(lambda: host.reports("reconfigure_failed"))
            assert failed["error"] == "reconfigure took over 0.1 s (initialization_timeout_s)."
            world.books.gate.open()
            assert await value(caller, put(caller, "get_config", "after")) == ["old", "old"]

    async def test_a_replica_that_is_told_to_leave_waits_for_no_new_config(self, world: World) -> None:
        world.deploy(user_config=world.codec.pack("old"), graceful_shutdown_timeout_s=300.0)
        (host,) = await world.start()
        async with calling(world.settings, NAME) as caller:
            before = put(caller, "get_config", "before")
            await world.started("before")
            world.deploy(user_config=world.codec.pack("new"), graceful_shutdown_timeout_s=300.0)
            await until(lambda: host.reports("asks_to_apply"))
            host.kill(signal.SIGUSR2)
            await takes_no_more(caller)

            host.kill(signal.SIGTERM)
            await host.reached("DRAINING")
            world.books.gate.open()

            assert await value(caller, before) == ["old", "old"]
            assert await host.ended() == 0
        assert not host.reports("reconfigure_failed")


class TestFrames:
    async def test_what_is_no_call_of_ours_is_rejected_counted_and_kept_among_the_dead_letters(
        self, world: World
    ) -> None:
        world.deploy()
        await world.start()
        async with calling(world.settings, NAME) as caller:
            body = encode(call_of(caller, NAME))
            flipped = bytearray(world.signer.seal(body))
            flipped[40] ^= 4
            frames = {
                "no frame": b"",
                "unsigned": b"\x00" + body,
                "another key": Signer((b"x",)).seal(body),
                "flipped bit": bytes(flipped),
                "another deployment": world.signer.seal(encode(call_of(caller, "Other"))),
                "not a call": world.signer.seal(b"\x93\x01\x02\x03"),
            }
            for frame in frames.values():
                world.redis.xadd(world.keys.calls(NAME), {"r": "x", "f": "", "d": frame})

            await until(lambda: len(world.letters()) == len(frames))
            await until(lambda: world.counter("rejected_frames") == len(frames))
            assert all(letter[b"err"].startswith(b"rejected: ") for letter in world.letters())
            assert isinstance(await value(caller, put(caller, "pid", None)), int)
            assert world.redis.xlen(world.keys.calls(NAME)) == 0

    async def test_a_captured_frame_that_is_put_again_runs_once(self, world: World) -> None:
        world.deploy()
        world.books.gate.open()
        async with calling(world.settings, NAME) as caller:
            future = put(caller, "wait", "once")
            await until(lambda: world.redis.xlen(world.keys.calls(NAME)) == 1)
            ((_, captured),) = redis_entries(world.redis, world.keys)
            for _ in range(100):
                world.redis.xadd(world.keys.calls(NAME), captured)
            await world.start()

            assert await value(caller, future) == "once"
            await until(lambda: world.counter("rejected_frames") == 100)

        assert len(world.books.starts("once")) == 1

    async def test_a_pickle_without_a_key_is_never_opened(self, world: World, settings: Settings) -> None:
        world.settings = world.settings.model_copy(update={"secret": ""})
        world.settings.__dict__.pop("secrets", None)
        world.signer = Signer()
        world.deploy()
        await world.start()
        async with calling(world.settings, NAME) as caller:
            trap = world.codec.pack_call((Trap(world.folder / "sprung"),), {})
            future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            caller.client.put(
                caller.client.prepare(
                    NAME,
                    kind=PYTHON,
                    method="pid",
                    payload=trap,
                    timeout_s=60,
                    safe=False,
                    on_outcome=future.set_result,
                )
            )

            with pytest.raises(FrameRejected, match="a pickled value in a frame that is not signed"):
                await value(caller, future)

        await until(lambda: world.counter("rejected_frames") == 1)
        await until(lambda: len(world.letters()) == 1)
        assert not (world.folder / "sprung").exists()


class TestResults:
    async def test_a_result_that_cannot_travel_is_an_error_that_names_it(self, world: World) -> None:
        world.settings = world.settings.model_copy(update={"secret": "", "max_value_bytes": 16 * 2**20})
        world.settings.__dict__.pop("secrets", None)
        world.signer = Signer()
        world.deploy()
        await world.start()
        async with calling(world.settings, NAME) as caller:
            with pytest.raises(ResultNotSerializable, match="the result"):
                await value(caller, put(caller, "result", "lock"))
            with pytest.raises(ResultTooLarge):
                await value(caller, put(caller, "result", "large"))
            with pytest.raises(TaskError) as raised:
                await value(caller, put(caller, "result", "error"))
            assert raised.value.type_name == "Local"
            assert "raise Local(1, 2)" in raised.value.traceback_text

    async def test_a_running_safe_call_is_stopped_when_its_caller_cancels_and_an_unsafe_one_goes_on(
        self, world: World
    ) -> None:
        world.deploy()
        await world.start()
        async with calling(world.settings, NAME) as caller:
            calls = {
                name: caller.call(name, "wait", deployment=NAME, safe=name == "safe") for name in ("safe", "unsafe")
            }
            await until(lambda: len(world.books.starts()) == 2)
            for pending, future in calls.values():
                caller.client.cancel(pending)
                assert isinstance(await within(future), CallCancelled)
            # the safe one leaves the queue though the gate is closed
            await until(lambda: world.redis.xlen(world.keys.calls(NAME)) == 1)
            world.books.gate.open()
            await until(world.books.ended)

        assert world.books.ended() == ["unsafe"]


class Trap:
    """Leaves a file behind wherever it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def http_request() -> HttpRequest:
    return HttpRequest("GET", "/", b"/", b"", [], "", "http", None, None, "1.1", "request", b"")


def call_of(caller: Caller, deployment: str) -> Call:
    me, payload = caller.client.id, caller.codec.pack_call((None,), {})
    return Call(f"{me}{secrets.token_hex(4)}", deployment, me, 60_000, PYTHON, "pid", False, payload)


def redis_entries(client: "redis.Redis", keys: Keys) -> list[tuple[bytes, dict[Any, Any]]]:
    found: Any = client.xrange(keys.calls(NAME))
    return [(entry, dict(fields)) for entry, fields in found]
