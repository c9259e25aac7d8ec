"""Large payloads travel under a key of their own, whoever sends them, from QSERVE_OUT_OF_LINE_BYTES on."""

import asyncio
from typing import Any

import msgspec
import pytest

from qserve.broker.instance.state import State
from qserve.broker.payloads import Payloads
from qserve.broker.records import submit_now
from qserve.durable.dead_letters import DeadLetters
from qserve.durable.schedules import Plan, Schedules
from qserve.errors import (
    BackPressureError,
    BrokerUnavailable,
    DeploymentNotFound,
    DeploymentUnavailable,
    FrameRejected,
    QServeError,
)
from qserve.settings import Settings
from qserve.wire.call_record import DurableCall, DurableOptions, Terms, decode_durable_call
from qserve.wire.codec import Codec
from qserve.wire.messages import PYTHON, Call, Signer, encode
from qserve.wire.spec import DeploymentSpec, Target
from qserve_workers.celery_calls.celery_tasks import Desk
from tests.support.calling import LIMIT_S, Caller, calling, deploy, serving, within
from tests.support.chosen_server import needs_one_server
from tests.support.slowness import patience
from tests.support.waiting import until

LIMIT = 20
WORD = "a word that is longer than the limit"
CODEC = Codec(allow_pickle=False, max_bytes=1000)


@pytest.fixture
def small(settings: Settings) -> Settings:
    return settings.model_copy(update={"out_of_line_bytes": LIMIT, "celery_calls": True})


@pytest.fixture
def payloads(small: Settings, signer: Signer) -> Payloads:
    return Payloads(small.keys, signer, small.out_of_line_bytes)


@pytest.fixture
def queue(state: State) -> State:
    """A state in which 'x' is deployed, and nobody takes its calls."""
    state.deploy(DeploymentSpec(name="x", target=Target("m:x"), revision="r"), expected=0)
    return state


def submitted(state: State) -> DurableCall:
    """The only call in the queue, checked: its payload is out of line, and is kept for as long as the call is."""
    redis: Any = state.redis
    [(_, fields)] = redis.xrange(state.keys.calls("x"))
    call: DurableCall = decode_durable_call(state.signer.open(fields[b"d"]))
    assert (call.payload, call.out_of_line) == (b"", True)
    assert redis.pttl(state.keys.payload(call.id)) == -1
    return call


def argument(state: State, payloads: Payloads, call: DurableCall) -> object:
    payload = payloads.fetch_now(state.redis, call.id)
    assert payload is not None
    args, _ = CODEC.unpack_call(payload)
    return args[0]


def test_of_a_schedule(queue: State, payloads: Payloads) -> None:
    schedules = Schedules(queue)
    made = schedules.put(Plan("often", "every 1s", "x", "", DurableOptions(), (WORD,), {}), CODEC)
    overdue = msgspec.structs.replace(made, created=made.created - 10_000)
    queue.redis.hset(queue.keys.schedules, "often", queue.signer.seal(encode(overdue)))

    schedules.fire_due(payloads)

    assert argument(queue, payloads, submitted(queue)) == WORD


@needs_one_server
def test_of_a_celery_client_also_when_its_message_is_delivered_again(
    queue: State, small: Settings, payloads: Payloads
) -> None:
    desk = Desk(small)
    for _ in range(2):
        desk.take({"id": "t", "task": "qserve.call"}, [["x", "", [WORD]], {}, {}])

        assert argument(queue, payloads, submitted(queue)) == WORD
    desk.close()


def test_of_a_dead_letter_that_is_sent_again(queue: State, payloads: Payloads) -> None:
    call = Call("c", "x", "somebody", 60_000, PYTHON, "", True, CODEC.pack_call((WORD,), {}))
    frame = queue.signer.seal(encode(call))
    queue.redis.xadd(queue.keys.dead_letters("x"), {"r": "c", "f": "s", "d": frame, "err": "killed all replicas"})
    letters = DeadLetters(queue, LIMIT)

    call_id = letters.retry(letters.get("x", "c"))

    again = submitted(queue)
    assert again.id == call_id
    assert argument(queue, payloads, again) == WORD


async def test_of_a_call_and_its_result_it_is_not_in_redis_at_all(small: Settings, state: State) -> None:
    spec = deploy(small)
    async with calling(small) as caller:
        pending, outcome = caller.call(WORD)
        await until(lambda: pending.entry is not None)
        assert list(state.redis.scan_iter(state.keys.of("Echo").payload("*"))) == []
        async with serving(small, spec):
            assert caller.value(await within(outcome)) == WORD
    assert list(state.redis.scan_iter(state.keys.of("Echo").payload("*"))) == []


async def test_of_a_durable_call(queue: State, small: Settings, payloads: Payloads) -> None:
    async with calling(small, "x") as caller:
        call_id, said = await submit(caller)
        assert said == call_id

    assert argument(queue, payloads, submitted(queue)) == WORD


@pytest.mark.parametrize(
    ("meta", "key", "refusal"),
    [
        ({"max_queued": 1}, "", BackPressureError),
        ({}, "key", str),
        ({"refuse": "it does not start"}, "", DeploymentUnavailable),
        (None, "", DeploymentNotFound),
    ],
    ids=["full", "known", "refused", "unknown"],
)
async def test_of_a_durable_call_that_is_not_taken_nothing_is_left(
    queue: State, small: Settings, payloads: Payloads, meta: Any, key: str, refusal: type
) -> None:
    async with calling(small, "x") as caller:
        first, said = await submit(caller, key)
        assert said == first
        if meta is None:
            queue.redis.delete(queue.keys.meta("x"))
        elif meta:
            queue.redis.hset(queue.keys.meta("x"), mapping=meta)

        second, said = await submit(caller, key)

        assert isinstance(said, refusal)
        assert payloads.fetch_now(queue.redis, second) is None
        assert payloads.fetch_now(queue.redis, first) is not None


async def test_a_call_whose_payload_redis_refuses_to_store_is_not_taken(
    queue: State, small: Settings, payloads: Payloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be room for the call when there was none for its payload, which needs room on its way, too."""
    for name in ("put_unconfirmed", "put_unconfirmed_now"):
        monkeypatch.setattr(Payloads, name, lambda *_: None)
    async with calling(small, "x") as caller:
        _, said = await submit(caller, "key")
    assert isinstance(said, BrokerUnavailable)
    call = DurableCall("d1", "x", "", 1000, PYTHON, "", True, CODEC.pack_call((WORD,), {}), terms=Terms())
    with pytest.raises(BrokerUnavailable, match="no memory left for the large arguments"):
        submit_now(queue.redis, small.keys, queue.signer, payloads, call, DurableOptions())

    assert queue.redis.xlen(queue.keys.calls("x")) == 0
    assert list(queue.redis.scan_iter(queue.keys.of("x").call("*"))) == []


async def submit(caller: Caller, key: str = "") -> tuple[str, str | QServeError]:
    """Submit a durable call; returns its id, and what came of it."""
    admitted: asyncio.Future[str | QServeError] = asyncio.get_running_loop().create_future()
    submission = caller.client.durable.submissions.prepare(
        "x",
        kind=PYTHON,
        method="",
        payload=CODEC.pack_call((WORD,), {}),
        options=DurableOptions(idempotency=key, body_hash="body", key=key),
        on_admitted=admitted.set_result,
    )
    caller.client.durable.submissions.submit(submission)
    return submission.call.id, await asyncio.wait_for(admitted, patience(LIMIT_S))


def test_a_payload_stands_for_its_own_call_only(payloads: Payloads) -> None:
    sealed = payloads.seal("one", WORD.encode())
    assert sealed is not None
    assert payloads.open("one", sealed) == WORD.encode()
    with pytest.raises(FrameRejected, match="another call"):
        payloads.open("two", sealed)
    assert payloads.seal("one", b"x" * LIMIT) is None
