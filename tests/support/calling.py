"""Both ends of a queue in one event loop: a client, and replicas whose user code a test steers."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from starlette.requests import Request

from qserve.broker.instance.state import State
from qserve.broker.large.lending import Lending
from qserve.calls.client import Client
from qserve.calls.handles.handle_codec import codec_of
from qserve.calls.pending import PendingCall
from qserve.context import current_call, set_replica_context
from qserve.errors import QServeError
from qserve.settings import Settings, at_deployment
from qserve.wire.codec import Codec
from qserve.wire.messages import ERROR, MODEL, NO_META, PYTHON, Outcome, Signer, decode_error
from qserve.wire.parts import flat
from qserve.wire.spec import DeploymentSpec, Target
from qserve_workers.calls.consumer import Consumer
from qserve_workers.user.user_code import UserCode
from tests.support.slowness import patience

LIMIT_S = 20.0


class Code:
    """User code: says what it is told to, at once or when its gate opens."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.started: list[Any] = []
        self.ended: list[object] = []
        self.cancelled: list[object] = []

    async def __call__(self, value: object) -> object:
        if isinstance(value, Request):
            return await value.body()
        self.started.append(value)
        self.ended.append(value)
        return value

    async def wait(self, value: object) -> object:
        self.started.append(value)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(value)
            raise
        self.ended.append(value)
        return value

    async def begin(self) -> None:
        self.started.append(current_call.get())

    async def parts(self, value: object) -> AsyncIterator[object]:
        yield value

    async def fail(self, value: object) -> object:
        self.started.append(value)
        raise ValueError(value)


class Caller:
    """A client that speaks in values.

    Args:
        mainly: The deployment to which `client` belongs where each shard has one.
    """

    def __init__(self, settings: Settings, mainly: str = "Echo") -> None:
        self.client = Client(at_deployment(settings, mainly))
        self.codec: Codec = codec_of(self.client)
        self.outcomes: list[Outcome] = []

    def call(
        self,
        value: object,
        method: str = "",
        *,
        deployment: str = "Echo",
        timeout_s: float = 60.0,
        safe: bool = False,
        model: str = "",
        on_outcome: Callable[[Outcome], None] | None = None,
    ) -> tuple[PendingCall, "asyncio.Future[Outcome]"]:
        """Put a call; the future gets its outcome, and fails if there is a second one."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        client = self.client.of(deployment)
        pending = client.prepare(
            deployment,
            kind=PYTHON,
            method=method,
            payload=self.codec.pack_arguments((value,), {}),
            timeout_s=timeout_s,
            safe=safe,
            on_outcome=on_outcome or future.set_result,
            meta={MODEL: model} if model else NO_META,
        )
        client.put(pending)
        return pending, future

    async def ask(
        self, value: object, method: str = "", *, timeout_s: float = 60.0, deployment: str = "Echo"
    ) -> object:
        """Call and return the value, or raise."""
        _, future = self.call(value, method, timeout_s=timeout_s, deployment=deployment)
        return self.value(await within(future))

    def value(self, outcome: Outcome) -> object:
        """The value of an outcome; raises its error."""
        if isinstance(outcome, QServeError):
            raise outcome
        if outcome.kind == ERROR:
            raise self.codec.rebuild_error(decode_error(flat(outcome.payload)))
        value: object = self.codec.unpack(outcome.payload)
        return value


async def within(future: "asyncio.Future[Outcome]", limit_s: float = LIMIT_S) -> Outcome:
    """The future's result, which may not take long."""
    return await asyncio.wait_for(future, patience(limit_s))


def deploy(
    settings: Settings, name: str = "Echo", *, max_queued: int = 10_000, idempotent: bool = False
) -> DeploymentSpec:
    """Deploy something that nobody serves yet."""
    spec = DeploymentSpec(
        name=name,
        target=Target("m:C"),
        revision="r",
        max_queued_requests=max_queued,
        max_concurrent_queries=1000,
        idempotent=idempotent,
    )
    state = State(settings.redis_url, settings.keys, Signer(settings.secrets))
    state.deploy(spec, expected=state.generation(name))
    state.redis.hset(settings.keys.meta(name), "last_seen", state.redis.time()[0])
    state.close()
    return spec


@asynccontextmanager
async def calling(settings: Settings, mainly: str = "Echo") -> AsyncIterator[Caller]:
    """A caller, connected."""
    caller = Caller(settings, mainly)
    await caller.client.start()
    try:
        yield caller
    finally:
        await caller.client.stop()


@asynccontextmanager
async def serving(settings: Settings, spec: DeploymentSpec) -> AsyncIterator[tuple[Consumer, Code]]:
    """A consumer of the deployment's queue and its code."""
    settings = at_deployment(settings, spec.name)
    signer = Signer(settings.secrets)
    codec = Codec(allow_pickle=signer.signs, max_bytes=settings.max_value_bytes, large=settings.out_of_line_bytes + 1)
    replica = secrets.token_hex(16)
    lending = Lending(replica, settings.keys.address(settings.redis_url), settings.keys, signer)
    consumer = Consumer(settings, signer, codec, spec, replica, lending)
    code = Code()
    user_code = UserCode(msgspec.structs.replace(spec, is_class=False), code, f"{spec.name}#1", codec)
    await user_code.construct()
    await consumer.connect()
    consumer.start(user_code)
    try:
        yield consumer, code
    finally:
        code.gate.set()
        await consumer.pause()
        await consumer.stop()
        lending.stop()
        await user_code.close()
        set_replica_context(None)
