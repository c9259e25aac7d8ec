"""Hooks of callers: they see where a call is made, what becomes of it, and what they say travels with it."""

import threading
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

import msgspec
import pytest

from qserve.broker.instance.state import State
from qserve.broker.payloads import Payloads
from qserve.calls import process_client
from qserve.calls.handle import AsyncDeploymentHandle, get_handle
from qserve.durable.dead_letters import DeadLetters
from qserve.durable.schedules import Plan, Schedules
from qserve.errors import CallCancelled, DeploymentNotFound, TaskError, ValueNotSerializable
from qserve.hooks import ClientCall, ClientHook
from qserve.settings import Settings
from qserve.wire.call_record import DurableOptions, decode_durable_call
from qserve.wire.codec import Codec
from qserve.wire.messages import MODEL, PYTHON, CallWithMeta, Signer, decode_call, encode
from tests.support.calling import Caller, calling, deploy, serving
from tests.support.waiting import until

tenant: ContextVar[str] = ContextVar("tenant")
notes: list[tuple[Any, ...]] = []
CODEC = Codec(allow_pickle=False, max_bytes=1000)


class Noting(ClientHook):
    def before(self, call: ClientCall) -> str:
        call.meta["tenant"] = tenant.get()
        notes.append(("before", call.deployment, call.method, call.kind, call.durable))
        return "state"

    def after(self, call: ClientCall, state: Any) -> None:
        notes.append(("after", call.method, state))

    def error(self, call: ClientCall, state: Any, error: BaseException) -> None:
        notes.append(("error", call.method, state, type(error)))


class Failing(ClientHook):
    def before(self, call: ClientCall) -> None:
        raise RuntimeError("a hook that fails")

    def after(self, call: ClientCall, state: Any) -> None:
        raise RuntimeError("another one")

    def error(self, call: ClientCall, state: Any, error: BaseException) -> None:
        raise RuntimeError("another one")


@pytest.fixture
def hooked(settings: Settings) -> Settings:
    notes.clear()
    tenant.set("ä company")
    return settings.model_copy(update={"hooks": f"{__name__}:Failing,{__name__}:Noting"})


@pytest.fixture
async def caller(hooked: Settings) -> AsyncIterator[Caller]:
    """The client of this process, in whose namespace Echo is deployed."""
    deploy(hooked)
    async with calling(hooked) as caller:
        process_client.set_current_client(caller.client)
        yield caller
        process_client.set_current_client(None)


@pytest.fixture
def echo() -> AsyncDeploymentHandle[Any]:
    return get_handle("Echo", sync=False)


async def entry(state: State) -> bytes:
    """The body of the only call in the queue, once it is there."""
    redis: Any = state.redis
    await until(lambda: redis.xlen(state.keys.calls("Echo")) == 1)
    return only_entry(state)


def only_entry(state: State) -> bytes:
    redis: Any = state.redis
    [(_, fields)] = redis.xrange(state.keys.calls("Echo"))
    return state.signer.open(fields[b"d"])


async def test_what_they_say_of_a_call_travels_with_it(
    caller: Caller, echo: AsyncDeploymentHandle[Any], state: State, hooked: Settings
) -> None:
    ref = await echo.remote(1)

    assert notes == [("before", "Echo", "", "call", False)]
    assert decode_call(await entry(state)).meta == {"tenant": "ä company"}
    async with serving(hooked, deploy(hooked)):
        assert await ref == 1
    assert notes[1:] == [("after", "", "state")]


async def test_they_learn_why_there_is_no_result(
    caller: Caller, echo: AsyncDeploymentHandle[Any], hooked: Settings
) -> None:
    withdrawn = await echo.remote(1)
    withdrawn.cancel()
    assert notes.pop() == ("error", "", "state", CallCancelled)

    with pytest.raises(ValueNotSerializable):
        await echo.wait.remote(threading.Lock())
    assert notes.pop() == ("error", "wait", "state", ValueNotSerializable)

    async with serving(hooked, deploy(hooked)):
        with pytest.raises(ValueError, match="no good"):
            await (await echo.fail.remote("no good"))
    _, method, _, error = notes.pop()
    assert method == "fail"
    assert issubclass(error, TaskError)


async def test_around_a_stream(
    caller: Caller, echo: AsyncDeploymentHandle[Any], state: State, hooked: Settings
) -> None:
    stream = echo.options(stream=True).parts.remote(1)

    assert decode_call(await entry(state)).meta == {"tenant": "ä company"}
    async with serving(hooked, deploy(hooked)):
        assert [part async for part in stream] == [1]
    assert notes == [("before", "Echo", "parts", "stream", False), ("after", "parts", "state")]


async def test_around_the_submission_of_a_durable_call(
    caller: Caller, echo: AsyncDeploymentHandle[Any], state: State
) -> None:
    await echo.options(durable=True, retries=2).remote(1)

    call = decode_durable_call(await entry(state))
    assert (call.meta, call.terms.retries) == ({"tenant": "ä company"}, 2)
    assert notes == [("before", "Echo", "", "call", True), ("after", "", "state")]

    with pytest.raises(DeploymentNotFound):
        await get_handle("Nobody", sync=False).options(durable=True).remote(1)
    assert notes[-1] == ("error", "", "state", DeploymentNotFound)


async def test_without_hooks_there_is_nothing(settings: Settings, echo: AsyncDeploymentHandle[Any]) -> None:
    notes.clear()
    spec = deploy(settings)
    async with calling(settings) as caller, serving(settings, spec):
        process_client.set_current_client(caller.client)
        assert caller.client.hooks is None
        assert await (await echo.remote(1)) == 1
        process_client.set_current_client(None)
    assert notes == []


def test_what_a_schedule_was_made_with_is_said_by_each_of_its_calls(state: State, settings: Settings) -> None:
    deploy(settings)
    schedules, payloads = Schedules(state), Payloads(settings.keys, state.signer, settings.out_of_line_bytes)
    plan = Plan("often", "every 1s", "Echo", "", DurableOptions(), (1,), {}, {"tenant": "a"})
    made = schedules.put(plan, CODEC)
    assert schedules.put(plan._replace(meta={"tenant": "b"}), CODEC) == made, "it goes on as if nothing had happened"
    overdue = msgspec.structs.replace(made, created=made.created - 10_000)
    state.redis.hset(state.keys.schedules, "often", state.signer.seal(encode(overdue)))

    schedules.fire_due(payloads)

    assert decode_durable_call(only_entry(state)).meta == {"tenant": "a"}
    assert schedules.put(plan._replace(meta={MODEL: "large"}), CODEC).meta == {MODEL: "large"}, (
        "it calls something else"
    )


def test_what_was_said_of_a_call_is_said_again_when_it_is_sent_again(
    state: State, settings: Settings, signer: Signer
) -> None:
    deploy(settings)
    said = {"tenant": "a"}
    lost = CallWithMeta("c", "Echo", "somebody", 60_000, PYTHON, "", True, CODEC.pack_call((1,), {}), meta=said)
    letter: dict[Any, Any] = {"r": "c", "f": "s", "d": signer.seal(encode(lost)), "err": "killed all replicas"}
    state.redis.xadd(state.keys.dead_letters("Echo"), letter)
    letters = DeadLetters(state, settings.out_of_line_bytes)

    letters.retry(letters.get("Echo", "c"))

    assert decode_durable_call(only_entry(state)).meta == said
