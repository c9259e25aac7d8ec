"""Calls from the caller's side: each has one outcome, its own, whatever happens to the connection."""

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from qserve.broker.keys import Keys
from qserve.durable.watching import CallWatcher
from qserve.errors import (
    BackPressureError,
    BrokerUnavailable,
    CallCancelled,
    DeploymentNotFound,
    DeploymentUnavailable,
    GetTimeoutError,
    Indeterminate,
    QServeError,
)
from qserve.settings import Settings
from qserve.wire.call_record import DurableOptions
from qserve.wire.messages import CONTROL, PYTHON, VALUE, Outcome, Reply, Signer, encode
from tests.support.calling import LIMIT_S, Caller, Code, calling, deploy, serving, within
from tests.support.servers import Server
from tests.support.slowness import patience
from tests.support.waiting import until


@pytest.fixture
def keys(settings: Settings) -> Keys:
    """Key names of the shard in which Echo lies."""
    return settings.keys.of("Echo")


@pytest.fixture
async def caller(settings: Settings) -> AsyncIterator[Caller]:
    """A caller of a signed namespace in which Echo is deployed."""
    deploy(settings)
    async with calling(settings) as caller:
        yield caller


@pytest.fixture
async def code(caller: Caller) -> AsyncIterator[Code]:
    """The user code of a replica that serves Echo."""
    settings = caller.client.settings
    async with serving(settings, deploy(settings)) as (_, code):
        yield code


class TestOutcomes:
    async def test_each_of_many_calls_gets_its_own_answer(self, caller: Caller, code: Code) -> None:
        assert await asyncio.gather(*(caller.ask(n) for n in range(2000))) == list(range(2000))
        assert caller.client.pending == 0

    async def test_an_error_of_user_code_is_the_outcome(self, caller: Caller, code: Code) -> None:
        with pytest.raises(ValueError, match="no good"):
            await caller.ask("no good", "fail")

    async def test_a_second_answer_reaches_nobody(
        self, caller: Caller, code: Code, redis_client: "redis.Redis", keys: Keys, signer: Signer
    ) -> None:
        pending, future = caller.call("first")
        await within(future)
        again = signer.seal(encode(Reply(pending.id, caller.client.id, VALUE, caller.codec.pack("second"))))
        redis_client.xadd(keys.inbox(caller.client.id), {"d": again})

        assert await caller.ask("third") == "third"

    async def test_a_receiver_that_fails_harms_no_other_call(self, caller: Caller, code: Code) -> None:
        def fail(_: Outcome) -> None:
            raise RuntimeError("not now")

        caller.call("a", on_outcome=fail)

        assert await caller.ask("b") == "b"

    async def test_a_call_to_something_not_deployed_is_refused(self, caller: Caller) -> None:
        with pytest.raises(DeploymentNotFound, match="there is no deployment 'Nothing'"):
            await caller.ask("x", deployment="Nothing")

    async def test_a_call_to_what_failed_is_refused_with_the_reason(
        self, caller: Caller, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        redis_client.hset(keys.meta("Echo"), "refuse", "no model")

        with pytest.raises(
            DeploymentUnavailable, match="calls to 'Echo' are refused until a version of it starts: no model"
        ):
            await caller.ask("x")

    async def test_calls_over_the_bound_are_refused_and_the_others_kept(
        self, caller: Caller, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        redis_client.hset(keys.meta("Echo"), "max_queued", 3)
        futures = [caller.call(n)[1] for n in range(5)]

        refused = [await within(future) for future in futures[3:]]

        for outcome in refused:
            assert isinstance(outcome, BackPressureError)
            assert "(3 calls wait or run)" in str(outcome)
            assert outcome.retry_after >= 1
        assert not any(future.done() for future in futures[:3])

    async def test_calls_that_still_wait_when_the_client_stops_end_as_cancelled(self, settings: Settings) -> None:
        deploy(settings)
        async with calling(settings) as caller:
            _, waiting = caller.call("a")
        _, late = caller.call("b")

        assert isinstance(await within(waiting), CallCancelled)
        assert isinstance(await within(late), CallCancelled)

    async def test_an_inbox_is_gone_with_its_client(self, settings: Settings, redis_client: "redis.Redis") -> None:
        spec = deploy(settings)
        async with serving(settings, spec), calling(settings) as caller:
            await caller.ask("a")
        left = redis_client.keys(f"*{caller.client.id}*")

        assert left == []


class TestDeadlines:
    async def test_a_call_over_its_deadline_ends_in_a_timeout_and_leaves_the_queue(
        self, caller: Caller, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        with pytest.raises(GetTimeoutError, match="did not end before its deadline"):
            await caller.ask("x", timeout_s=0.05)
        await until(lambda: redis_client.xlen(keys.calls("Echo")) == 0)

    async def test_where_no_replica_was_seen_lately_the_outcome_says_since_when(
        self, caller: Caller, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        seen = int(time.time()) - 300
        redis_client.hset(keys.meta("Echo"), "last_seen", seen)
        since = time.strftime("%H:%M", time.localtime(seen))

        with pytest.raises(DeploymentUnavailable, match=f"^no replica of 'Echo' has been seen since {since}; "):
            await caller.ask("x", timeout_s=0.05)

    async def test_where_no_replica_was_ever_seen_the_outcome_says_so(
        self, caller: Caller, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        redis_client.hdel(keys.meta("Echo"), "last_seen")

        with pytest.raises(DeploymentUnavailable, match=r"^no replica of 'Echo' has been seen; "):
            await caller.ask("x", timeout_s=0.05)

    async def test_an_expired_call_is_not_run(self, caller: Caller, settings: Settings) -> None:
        pending, future = caller.call("late", timeout_s=0.05)
        await until(lambda: pending.entry is not None)
        pending.entry, entry = None, pending.entry  # its caller cannot withdraw it
        await within(future)

        async with serving(settings, deploy(settings)) as (consumer, code):
            await until(lambda: consumer.slots.handled == 1)

        assert entry is not None
        assert code.started == []

    async def test_the_answer_after_the_deadline_is_dropped(self, caller: Caller, code: Code) -> None:
        _, future = caller.call("slow", "wait", timeout_s=0.1)
        assert isinstance(await within(future), GetTimeoutError)

        code.gate.set()

        await until(lambda: code.ended == ["slow"])
        assert await caller.ask("next") == "next"


class TestPayloads:
    async def test_a_queue_of_large_calls_stays_small(
        self, caller: Caller, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        pending, _ = caller.call(bytes(1_000_000))
        await until(lambda: pending.entry is not None)

        assert (redis_client.memory_usage(keys.calls("Echo")) or 0) < 10_000

    async def test_what_is_no_large_result_is_told(
        self, caller: Caller, redis_client: "redis.Redis", keys: Keys, signer: Signer
    ) -> None:
        pending, future = caller.call("x")
        reply = Reply(pending.id, caller.client.id, VALUE, b"", True)
        redis_client.xadd(keys.inbox(caller.client.id), {"d": signer.seal(encode(reply))})

        outcome = await within(future)

        assert isinstance(outcome, BrokerUnavailable)
        assert "its large result could not be fetched" in str(outcome)


class TestWhatNobodyWaitsFor:
    async def test_an_inbox_in_which_nothing_is_awaited_is_read_with_the_next_call(
        self, caller: Caller, code: Code
    ) -> None:
        await caller.ask(1)
        assert caller.client.link.waiter.is_idle

        pending, future = caller.call("next", "wait")
        await until(lambda: pending.entry is not None)
        assert not caller.client.link.waiter.is_idle
        caller.client.cancel(pending)
        code.gate.set()
        assert isinstance(await within(future), CallCancelled)

    async def test_what_comes_all_the_same_is_read_within_a_second(
        self, caller: Caller, code: Code, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        await caller.ask(1)

        redis_client.xadd(keys.inbox(caller.client.id), {"d": b"x"})

        await until(lambda: redis_client.hget(keys.counters, "rejected_frames") == b"1")

    async def test_an_inbox_is_read_on_while_a_durable_call_is_watched_or_controls_may_come(
        self, caller: Caller, code: Code
    ) -> None:
        await caller.ask(1)

        watcher = CallWatcher(lambda _outcome: None, lambda _progress: None)
        caller.client.durable.watchers.watch("somebody's", watcher)
        assert not caller.client.link.waiter.is_idle
        await caller.ask(2)
        assert not caller.client.link.waiter.is_idle

        caller.client.durable.watchers.forget("somebody's", watcher)
        caller.client.on_control = lambda _about, _control: None
        await caller.ask(3)
        assert not caller.client.link.waiter.is_idle


class TestFramesOfStrangers:
    async def test_frames_that_are_not_for_this_process_are_dropped_and_counted(
        self, caller: Caller, code: Code, redis_client: "redis.Redis", keys: Keys, signer: Signer
    ) -> None:
        inbox, me = keys.inbox(caller.client.id), caller.client.id
        pending, future = caller.call("mine", "wait")
        await until(lambda: code.started)
        answer = encode(Reply(pending.id, me, VALUE, caller.codec.pack("forged")))
        flipped = bytearray(signer.seal(answer))
        flipped[-1] ^= 1
        forged = [
            b"x",
            b"\x00" + answer,
            Signer((b"another key",)).seal(answer),
            bytes(flipped),
            signer.seal(encode(Reply(pending.id, "somebody else", VALUE, b""))),
            signer.seal(b"no reply"),
            signer.seal(encode(Reply("", me, CONTROL, b"no control"))),
        ]
        caller.client.on_control = lambda _about, _control: None

        for frame in forged:
            redis_client.xadd(inbox, {"d": frame})

        await until(lambda: redis_client.hget(keys.counters, "rejected_frames") == str(len(forged)).encode())
        assert not future.done()
        code.gate.set()
        assert caller.value(await within(future)) == "mine"

    async def test_no_flipped_bit_of_a_reply_is_accepted(
        self, caller: Caller, redis_client: "redis.Redis", keys: Keys, signer: Signer
    ) -> None:
        pending, future = caller.call("mine")
        frame = signer.seal(encode(Reply(pending.id, caller.client.id, VALUE, caller.codec.pack("answer"))))
        with redis_client.pipeline() as pipe:
            for bit in range(len(frame) * 8):
                flipped = bytearray(frame)
                flipped[bit // 8] ^= 1 << bit % 8
                pipe.xadd(keys.inbox(caller.client.id), {"d": bytes(flipped)})
            pipe.execute()

        await until(lambda: int(redis_client.hget(keys.counters, "rejected_frames") or 0) == len(frame) * 8)
        assert not future.done()


class TestCancelling:
    async def test_a_queued_call_that_is_cancelled_never_runs(self, caller: Caller, settings: Settings) -> None:
        pending, future = caller.call("never")
        await until(lambda: pending.entry is not None)

        caller.client.cancel(pending)

        assert isinstance(await within(future), CallCancelled)
        async with serving(settings, deploy(settings)) as (_, code):
            assert await caller.ask("next") == "next"
        assert code.started == ["next"]

    async def test_a_call_cancelled_in_the_tick_it_was_put_is_not_sent(
        self, caller: Caller, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        caller.call("first")  # leaves at once; the next ones wait for the end of the tick
        pending, _ = caller.call("second")

        caller.client.cancel(pending)

        await asyncio.sleep(0)
        await until(lambda: redis_client.xlen(keys.calls("Echo")) == 1)
        assert pending.entry is None

    async def test_a_running_unsafe_call_goes_on(self, caller: Caller, code: Code) -> None:
        pending, future = caller.call("unsafe", "wait")
        await until(lambda: code.started)

        caller.client.cancel(pending)
        code.gate.set()

        assert isinstance(await within(future), CallCancelled)
        await until(lambda: code.ended == ["unsafe"])

    async def test_ten_thousand_random_cancels_swap_nothing(self, caller: Caller, code: Code) -> None:
        dice = random.Random(7)
        calls = []
        for number in range(10_000):
            pending, future = caller.call(number)
            calls.append((number, pending, future))
            if number % 10 == 0:
                await asyncio.sleep(0)
            _, victim, _ = dice.choice(calls[-200:])
            caller.client.cancel(victim)

        answered = 0
        for number, _, future in calls:
            outcome = await within(future, 60)
            if not isinstance(outcome, CallCancelled):
                assert caller.value(outcome) == number
                answered += 1
        assert answered
        assert caller.client.pending == 0


class TestLostConnections:
    async def test_answers_arrive_though_every_connection_was_killed(
        self, caller: Caller, code: Code, redis_client: "redis.Redis"
    ) -> None:
        futures = [caller.call(n, "wait")[1] for n in range(100)]
        await until(lambda: len(code.started) == 100)

        redis_client.client_kill_filter(_type="normal", skipme=True)
        code.gate.set()

        outcomes = [caller.value(await within(future)) for future in futures]
        assert outcomes == list(range(100))
        assert sorted(map(str, code.started)) == sorted(map(str, range(100)))

    async def test_killed_connections_under_load_lose_no_call_and_run_none_twice(
        self, caller: Caller, code: Code, redis_client: "redis.Redis"
    ) -> None:
        """A call whose connection broke before Redis confirmed it may fail; none hangs, none runs twice."""
        futures = []
        for number in range(3000):
            futures.append(caller.call(number)[1])
            if number % 100 == 0:
                await asyncio.sleep(0.002)
            if number % 1000 == 500:
                redis_client.client_kill_filter(_type="normal", skipme=True)

        outcomes = [await within(future, 30) for future in futures]

        failed = [outcome for outcome in outcomes if isinstance(outcome, Indeterminate)]
        for number, outcome in enumerate(outcomes):
            if outcome not in failed:
                assert caller.value(outcome) == number
        assert len(failed) < 1500
        assert len(set(code.started)) == len(code.started)

    async def test_a_call_put_while_the_connection_is_away_is_sent_when_it_is_back(
        self, caller: Caller, code: Code
    ) -> None:
        caller.client.link.lose()
        assert not caller.client.sender.is_open

        assert await caller.ask("patient") == "patient"


@pytest.fixture
def make_server() -> Iterator[Any]:
    """Makes servers of the test's own."""
    with contextlib.ExitStack() as stack:

        def make(*, keeps_data: bool) -> Server:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qs-")))
            server = Server(folder, keeps_data=keeps_data)
            stack.callback(server.kill)
            return server

        yield make


class TestRestarts:
    async def test_calls_in_flight_survive_a_restart_of_a_server_that_keeps_its_data(self, make_server: Any) -> None:
        server = make_server(keeps_data=True)
        settings = Settings(redis_url=server.url, secret="k")
        async with calling(settings) as caller, serving(settings, deploy(settings)) as (_, code):
            pending, future = caller.call("kept", "wait")
            await until(lambda: code.started and pending.entry)

            server.kill()
            code.gate.set()
            await until(lambda: code.ended)
            server.start()

            assert caller.value(await within(future)) == "kept"
            assert code.started == ["kept"]
            assert await caller.ask("after") == "after"

    async def test_calls_in_flight_end_when_a_server_comes_back_empty(self, make_server: Any) -> None:
        server = make_server(keeps_data=False)
        settings = Settings(redis_url=server.url, secret="k")
        async with calling(settings) as caller, serving(settings, deploy(settings)) as (_, code):
            pending, future = caller.call("lost", "wait")
            await until(lambda: code.started and pending.entry)

            server.kill()
            server.start()

            outcome = await within(future)
            assert isinstance(outcome, Indeterminate)
            assert "Redis lost the call" in str(outcome)
            code.gate.set()
            deploy(settings)
            assert await caller.ask("after") == "after"

    async def test_calls_to_a_server_that_stays_away_are_refused_soon(self, make_server: Any) -> None:
        server = make_server(keeps_data=False)
        settings = Settings(redis_url=server.url, secret="k")
        async with calling(settings) as caller:
            deploy(settings)
            server.kill()
            await until(lambda: not caller.client.sender.is_open)

            outcome = await within(caller.call("x")[1], 10)

            assert isinstance(outcome, BrokerUnavailable)


FORKS = """
import asyncio, os, signal, sys, threading
import qserve
from qserve.calls import future
from qserve.calls.handle import get_handle
handle = get_handle("Echo")
ref = handle.wait.remote("before")
stream = handle.options(stream=True).parts.remote("part")
warm = handle.remote("warm")
assert warm.result(20) == "warm"

held, forked = threading.Event(), threading.Event()

def settle_something():
    with future._lock:
        held.set()
        forked.wait()

async def awaited(awaitable):
    return await awaitable

def refused(ask, *arguments):
    try:
        ask(*arguments)
    except RuntimeError as exc:
        return "before this process was forked" in str(exc)

threading.Thread(target=settle_something).start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(30)
    try:
        assert handle.remote("child").result(20) == "child"
        assert warm.result(20) == asyncio.run(awaited(warm)) == "warm"
        assert refused(ref.result) and refused(ref.exception) and refused(qserve.get, [ref])
        assert refused(asyncio.run, awaited(ref)) and refused(handle.remote, ref)
        assert refused(next, stream) and refused(asyncio.run, awaited(anext(stream)))
        del stream
    except BaseException as exc:
        print("child:", repr(exc), file=sys.stderr)
        os._exit(1)
    os._exit(0)
ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
forked.set()
assert ended == 0
assert list(stream) == ["part"]
assert handle.remote("parent").result(20) == "parent"
print("forked", flush=True)
assert ref.result(20) == "before"
"""


async def test_a_forked_child_calls_with_a_client_of_its_own_and_leaves_refs_to_its_parent(
    caller: Caller, code: Code
) -> None:
    settings = caller.client.settings
    environment = os.environ | {
        "QSERVE_REDIS_URL": settings.redis_url,
        "QSERVE_SECRET": settings.secret,
        "QSERVE_NAMESPACE": settings.namespace,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FORKS, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    await asyncio.wait_for(process.stdout.readline(), patience(40))
    code.gate.set()
    _, errors = await asyncio.wait_for(process.communicate(), patience(20))

    assert process.returncode == 0, errors.decode()
    assert code.started == ["before", "warm", "child", "parent"]


async def submit(caller: Caller, deployment: str, options: DurableOptions) -> str | QServeError:
    """What becomes of a durable call: its id, or why it was not taken."""
    submissions = caller.client.of(deployment).durable.submissions
    verdict: asyncio.Future[str | QServeError] = asyncio.get_running_loop().create_future()
    packed = caller.codec.pack_call((1,), {})
    prepared = submissions.prepare(
        deployment, kind=PYTHON, method="", payload=packed, options=options, on_admitted=verdict.set_result
    )
    submissions.submit(prepared)
    return await asyncio.wait_for(verdict, patience(LIMIT_S))


async def test_what_a_program_has_put_is_counted_when_it_ends_at_once(
    settings: Settings, redis_client: "redis.Redis", keys: Keys
) -> None:
    """Durable calls too, of which one with a known idempotency key is none."""
    async with calling(settings) as caller, serving(settings, deploy(settings)):
        for n in range(3):
            await caller.ask(n)
        admitted = [
            await submit(caller, "Echo", DurableOptions(idempotency=key, body_hash="same")) for key in ("a", "b", "a")
        ]
        assert admitted[2] == admitted[0] != admitted[1]
    assert redis_client.hget(keys.counters, "calls_of_programs") == b"5"


async def test_a_durable_call_to_what_redis_has_lost_may_be_tried_again(
    settings: Settings, redis_client: "redis.Redis", keys: Keys
) -> None:
    """Unlike one to a deployment that does not exist."""
    async with calling(settings) as caller:
        lost = await submit(caller, "Echo", DurableOptions())
        deploy(settings)
        unknown = await submit(caller, "Nothing", DurableOptions())
    assert isinstance(unknown, DeploymentNotFound)
    if keys.shards > 1:
        return  # a shard cannot tell
    assert isinstance(lost, BrokerUnavailable)
    assert "A node that runs puts the deployments back within seconds: try again then" in str(lost)
