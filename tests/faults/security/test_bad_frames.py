"""Who can write to Redis can neither run code nor forge a call: nothing of what they put there comes to anything."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import redis

from qserve.broker.instance.state import State
from qserve.broker.keys import Keys
from qserve.calls.pending import PendingCall
from qserve.durable.watching import CallWatcher
from qserve.errors import FrameRejected, QServeError
from qserve.settings import Settings
from qserve.wire.call_record import DurableOptions
from qserve.wire.messages import CHUNK, CONTROL, PYTHON, VALUE, Outcome, Reply, Signer, encode
from qserve.wire.spec import DeploymentSpec, Target
from tests.faults.security import bad_frames as table
from tests.support.calling import Caller, calling, deploy, serving, within
from tests.support.waiting import until

FLIPS = 10_000
IGNORED_CONTROLS = 2
"""Control messages are for replicas; other processes do not even look at them."""


def is_put(call: PendingCall) -> bool:
    return call.entry is not None


def rejected(client: "redis.Redis", keys: Keys) -> int:
    """How many frames the processes of a namespace have refused."""
    return int(cast("bytes", client.hget(keys.counters, "rejected_frames")) or 0)


def captured_from(client: "redis.Redis", keys: Keys) -> dict[Any, Any]:
    """The fields of the oldest entry in the queue."""
    return cast("list[tuple[bytes, dict[Any, Any]]]", client.xrange(keys.calls("Echo")))[0][1]


async def submit(caller: Caller, value: object, delay: float = 0.0) -> str:
    """Submit a durable call; returns its id."""
    told: list[str | QServeError] = []
    durable, payload = caller.client.durable, caller.codec.pack_call((value,), {})
    options = DurableOptions(delay_s=delay)
    durable.submissions.submit(
        durable.submissions.prepare(
            "Echo", kind=PYTHON, method="", payload=payload, options=options, on_admitted=told.append
        )
    )
    await until(lambda: told)
    return str(told[0])


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that nothing may make."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code from a frame was run"


def test_the_table_is_long_enough(settings: Settings, canary: Path) -> None:
    assert len(table.bad_frames(settings, "Echo", canary)) >= 100
    assert len(table.PLACES) >= 10


def test_no_flipped_bit_is_accepted(settings: Settings, signer: Signer) -> None:
    rng, accepted = random.Random(1), 0
    for _ in range(FLIPS):
        frame = signer.seal(encode(table.a_call("Echo", payload=rng.randbytes(rng.randrange(200)))))
        try:
            signer.open(table.flip(frame, rng.randrange(8 * len(frame))))
            accepted += 1
        except FrameRejected:
            pass
    assert accepted == 0


class TestReplica:
    @pytest.mark.parametrize("place", ["queue", "durable_queue", "odd_queue"])
    async def test_what_is_no_call_is_put_aside(
        self, place: str, settings: Settings, redis_client: "redis.Redis", keys: Keys, canary: Path
    ) -> None:
        frames = table.bad_frames(settings, "Echo", canary)
        spec, aim = deploy(settings), table.Aim(keys, "Echo", ())
        async with calling(settings) as caller, serving(settings, spec) as (_, code):
            for frame in frames.values():
                table.PLACES[place](redis_client, aim, frame)
            await until(lambda: redis_client.xlen(keys.calls("Echo")) == 0)
            put = len(frames) * (2 if place == "odd_queue" else 1)
            assert redis_client.xlen(keys.dead_letters("Echo")) == put
            await until(lambda: rejected(redis_client, keys) == put)
            assert await caller.ask("still here") == "still here"
            assert code.started == ["still here"]

    async def test_without_a_key_nothing_is_unpickled_and_nothing_gets_stuck(
        self, settings: Settings, redis_client: "redis.Redis", keys: Keys, canary: Path
    ) -> None:
        unsigned = Settings(redis_url=settings.redis_url, namespace=settings.namespace)
        frames = [*table.bad_frames(settings, "Echo", canary).values()]
        frames += [b"\0" + frame[37:] for frame in frames]  # what was signed, as anybody can send it here
        spec, aim = deploy(unsigned), table.Aim(keys, "Echo", ())
        async with calling(unsigned) as caller, serving(unsigned, spec):
            for place in ("queue", "durable_queue", "odd_queue"):
                for frame in frames:
                    table.PLACES[place](redis_client, aim, frame)
            await until(lambda: redis_client.xlen(keys.calls("Echo")) == 0)
            for frame in frames:
                redis_client.xadd(keys.inbox(caller.client.id), {"d": frame})
            assert await caller.ask("still here") == "still here"


class TestInbox:
    async def test_what_is_no_message_to_this_process_is_dropped(
        self, settings: Settings, redis_client: "redis.Redis", keys: Keys, canary: Path
    ) -> None:
        spec = deploy(settings)
        async with calling(settings) as caller, serving(settings, spec):
            frames = table.bad_frames(settings, "Echo", canary, caller.client.id)
            for frame in frames.values():
                redis_client.xadd(keys.inbox(caller.client.id), {"d": frame})
            await until(lambda: rejected(redis_client, keys) >= len(frames) - IGNORED_CONTROLS)
            assert await caller.ask("still here") == "still here"

    async def test_a_guessed_reply_reaches_nobody(
        self, settings: Settings, redis_client: "redis.Redis", keys: Keys, signer: Signer
    ) -> None:
        """Not without the key, and with a captured reply not for another call."""
        spec = deploy(settings)
        async with calling(settings) as caller, serving(settings, spec) as (_, code):
            pending, outcome = caller.call("mine", "wait")
            await until(lambda: code.started)
            captured = [
                Signer((b"guess",)).seal(encode(Reply(pending.id, caller.client.id, VALUE, b"\x07"))),
                signer.seal(encode(Reply(pending.id + "0", caller.client.id, VALUE, b"\x07"))),
                signer.seal(encode(Reply(pending.id, caller.client.id + "0", VALUE, b"\x07"))),
                Signer().seal(encode(Reply(pending.id, caller.client.id, VALUE, b"\x07"))),
                signer.seal(encode(Reply("", caller.client.id, CONTROL, b""))),
                signer.seal(encode(Reply(pending.id, caller.client.id, CHUNK, b""))),
            ]
            for frame in captured:
                redis_client.xadd(keys.inbox(caller.client.id), {"d": frame})
            await until(lambda: rejected(redis_client, keys) >= 4)
            code.gate.set()
            assert caller.value(await within(outcome)) == "mine"


class TestDurable:
    async def test_a_call_whose_frame_was_changed_ends_as_dead(
        self, settings: Settings, redis_client: "redis.Redis", keys: Keys, canary: Path
    ) -> None:
        """With the reason, for whoever waits; entries that only bear its id change nothing."""
        spec = deploy(settings)
        async with calling(settings) as caller:
            untouched = await submit(caller, "untouched")
            copied = captured_from(redis_client, keys)
            frames = table.bad_frames(settings, "Echo", canary)
            for frame in frames.values():
                redis_client.xadd(keys.calls("Echo"), copied | {b"d": frame})
            changed = await submit(caller, "changed", delay=0.2)
            redis_client.hset(keys.call(changed), "frame", frames["a bit of the body flipped: a call"])
            told: list[Outcome] = []
            caller.client.durable.watchers.attach(changed, CallWatcher(told.append, lambda _: None))
            async with serving(settings, spec) as (_consumer, code):
                await until(lambda: told)
                await until(lambda: redis_client.xlen(keys.calls("Echo")) == 0)
                assert code.started == ["untouched"]
            with pytest.raises(FrameRejected, match="signature"):
                caller.value(told[0])
            assert rejected(redis_client, keys) == len(frames) + 1
        assert redis_client.hget(keys.call(untouched), "state") == b"done"
        assert redis_client.hmget(keys.call(changed), "state", "error")[0] == b"dead"
        assert b"bad signature" in cast("bytes", redis_client.hget(keys.call(changed), "error"))
        assert redis_client.xlen(keys.dead_letters("Echo")) == len(frames) + 1


class TestState:
    """Of what is deployed, only what was signed as it stands there counts."""

    def test_a_spec_of_another_name_or_generation_is_refused(self, state: State, redis_client: "redis.Redis") -> None:
        keys = state.keys
        first = state.deploy(_spec("A", "old"), expected=0)
        old = redis_client.hget(keys.meta("A"), "spec")
        state.deploy(_spec("A", "new"), expected=first.generation)
        redis_client.hset(keys.meta("A"), "spec", old)
        with pytest.raises(FrameRejected, match="generation 1"):
            state.get("A")
        redis_client.hset(keys.meta("B"), mapping={"gen": "1", "spec": old})  # type: ignore[dict-item]
        redis_client.sadd(keys.deployments, "B")
        with pytest.raises(FrameRejected, match="'A'"):
            state.get("B")
        assert state.list() == {}


def _spec(name: str, revision: str) -> DeploymentSpec:
    return DeploymentSpec(name=name, target=Target("m:C"), revision=revision)


class TestReplays:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        """Of an instance that keeps all replicas from running a call again."""
        secret = settings.secret
        return Settings(redis_url=settings.redis_url, secret=secret, namespace=settings.namespace, refuse_replays=True)

    async def test_a_captured_frame_runs_once(
        self, settings: Settings, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        """Put again 100 times before, while and after it runs, with three replicas, then with new ones."""
        spec = deploy(settings)
        async with calling(settings) as caller:
            _, outcome = caller.call("once", "wait")
            await until(lambda: redis_client.xlen(keys.calls("Echo")) == 1)
            captured = captured_from(redis_client, keys)
            put = 0

            def replay(times: int) -> None:
                nonlocal put
                put += times
                for _ in range(times):
                    redis_client.xadd(keys.calls("Echo"), captured)

            replay(30)
            async with serving(settings, spec) as one, serving(settings, spec) as two, serving(settings, spec) as three:
                codes = [code for _, code in (one, two, three)]
                await until(lambda: any(code.started for code in codes))
                replay(30)
                await until(lambda: rejected(redis_client, keys) == put)
                for code in codes:
                    code.gate.set()
                assert caller.value(await within(outcome)) == "once"
                replay(20)
                await until(lambda: rejected(redis_client, keys) == put)
            async with serving(settings, spec) as (_, late):
                replay(20)
                await until(lambda: rejected(redis_client, keys) == put)
                assert await caller.ask("another") == "another"
            assert put == 100
            assert [value for code in codes for value in code.started] == ["once"]
            assert late.started == ["another"]
            assert redis_client.xlen(keys.dead_letters("Echo")) == put

    async def test_claims_are_small_and_go_after_the_time_of_their_calls(
        self, settings: Settings, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        spec = deploy(settings)
        async with calling(settings) as caller, serving(settings, spec):
            assert await asyncio.gather(*(caller.ask(n, timeout_s=30) for n in range(1000))) == list(range(1000))
        (claims,) = redis_client.keys(keys.claims("*", 0).replace("{", "[{]").replace("}", "[}]"))
        assert redis_client.bitcount(claims) == 1000
        assert (redis_client.memory_usage(claims) or 0) < 1024
        assert 90_000 < redis_client.pttl(claims) <= 2 * 90_000

    async def test_where_replicas_may_run_a_call_twice_nothing_is_claimed(
        self, settings: Settings, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        spec = deploy(settings, idempotent=True)
        async with calling(settings) as caller, serving(settings, spec):
            assert await caller.ask("safe") == "safe"
        assert not redis_client.keys("*claims*")

    async def test_a_captured_durable_frame_runs_once(
        self, settings: Settings, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        """Its record knows its only entry."""
        spec = deploy(settings)
        async with calling(settings) as caller:
            call = await submit(caller, "once")
            captured = captured_from(redis_client, keys)
            async with serving(settings, spec) as one, serving(settings, spec) as two:
                for flags in (b"sd", b"s", b""):
                    for _ in range(20):
                        redis_client.xadd(keys.calls("Echo"), captured | {b"f": flags})
                await until(lambda: redis_client.xlen(keys.calls("Echo")) == 0)
                assert one[1].started + two[1].started == ["once"]
            assert redis_client.hget(keys.call(call), "state") == b"done"
