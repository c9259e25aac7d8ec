"""One deployment in this process: the user's code as a replica would hold it, and nothing around it."""

import asyncio
import time
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from qserve.context import CallInfo, current_call
from qserve.deployments.loading import load_target
from qserve.wire.call_record import DurableCall
from qserve.wire.channel import Channel, Chunk
from qserve.wire.codec import Codec
from qserve.wire.messages import (
    ERROR,
    MODEL,
    STREAM,
    VALUE,
    Call,
    HttpRequest,
    HttpResponse,
    decode_http_response,
    encode,
    lineage_of,
    request_of,
)
from qserve.wire.parts import flat
from qserve.wire.spec import DeploymentSpec
from qserve_workers.user.user_code import UserCode
from qserve_workers.user.user_entry import what_was_raised

_MODEL_HEADER = b"serve_multiplexed_model_id"


class LocalReplica:
    """Runs the calls of one deployment. All methods belong to the event loop of the client."""

    def __init__(self, spec: DeploymentSpec, codec: Codec) -> None:
        self.spec = spec
        self.code = UserCode(spec, load_target(spec.target), f"{spec.name}#local", codec)
        self.context = self.code.context
        self._codec = codec
        self.slots = asyncio.Semaphore(spec.max_concurrent_queries)
        """One for each call that runs."""
        self.unanswered = 0
        """How many calls wait or run."""

    async def start(self) -> None:
        """Construct; raises what user code raised."""
        await self.code.construct()

    @property
    def is_full(self) -> bool:
        """Whether one more call is one too many."""
        return self.unanswered >= self.spec.max_queued_requests

    async def answer(self, call: Call, channel: Channel | None) -> tuple[int, bytes]:
        """Kind and payload of the reply to a call that came through a handle; a failure is a reply, too.

        Args:
            channel: Takes the parts of a stream.
        """
        info = CallInfo(request_of(call), deadline=time.monotonic() + call.ttl_ms / 1000)
        info.lineage, info.model_id = lineage_of(call), call.meta.get(MODEL, "")
        try:
            async with self.slots:
                current_call.set(info)
                args, kwargs = self._codec.unpack_call(call.payload)
                if call.kind == STREAM:
                    assert channel is not None
                    await self.code.stream(call.method, tuple(args), kwargs, channel)
                    return VALUE, b"%d" % channel.sent
                return VALUE, flat(self._codec.pack_result(await self.code.call(call.method, tuple(args), kwargs)))
        except asyncio.CancelledError:
            info.cancel_nested()
            raise
        except BaseException as exc:  # packing a result runs user code, too
            return ERROR, encode(self._codec.pack_error(what_was_raised(exc)))
        finally:
            info.deadline = None  # it does not hold for tasks and threads that the call has left behind

    async def run(self, call: DurableCall, info: CallInfo) -> bytes:
        """The packed result of a durable call that has a slot; raises what user code raised."""
        current_call.set(info)
        args, kwargs = self._codec.unpack_call(call.payload)
        return flat(self._codec.pack_result(await self.code.call(call.method, tuple(args), kwargs), whole=True))

    async def respond(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        """Answer one HTTP request or WebSocket; raises what user code raised."""
        async with self.slots:
            named = dict(scope["headers"])
            asked = named.get(b"x-request-id", b"").decode("latin-1")
            info = CallInfo(asked or request_id, model_id=named.get(_MODEL_HEADER, b"").decode("latin-1"))
            current_call.set(info)
            if self.spec.is_ingress:
                await self.code.asgi(scope, receive, send)
            elif scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": "not a WebSocket"})
            else:
                await self._respond_plainly(await _read_request(scope, receive, info.request_id), send)

    async def _respond_plainly(self, request: HttpRequest, send: Send) -> None:
        here, there = make_channels()
        parts = asyncio.create_task(_send_parts(here, send))
        try:
            response = await self.code.http(request, lambda: there)
        except BaseException:
            parts.cancel()
            raise
        if response is None:
            here.finish(there.sent)
            await parts
        else:
            parts.cancel()
            await send(_start_of(response))
            await send({"type": "http.response.body", "body": response.body})


def make_channels() -> tuple[Channel, Channel]:
    """The caller's and the replica's end of a channel within one event loop."""
    loop = asyncio.get_running_loop()

    def to_replica(_to: str, chunk: Chunk) -> None:
        loop.call_soon(there.feed, chunk)

    def to_caller(_to: str, chunk: Chunk) -> None:
        loop.call_soon(here.feed, chunk)

    here = Channel("caller", to_replica)
    there = Channel("replica", to_caller, "caller")
    return here, there


async def _read_request(scope: Scope, receive: Receive, request_id: str) -> HttpRequest:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return HttpRequest(
        *(scope["method"], scope["path"], scope["raw_path"], scope["query_string"], list(scope["headers"])),
        *(scope["root_path"], scope.get("scheme", "http"), scope.get("client"), scope.get("server")),
        scope["http_version"],
        *(request_id, body),
    )


async def _send_parts(channel: Channel, send: Send) -> None:
    begun = await channel.receive()
    if begun is None:
        return
    await send(_start_of(decode_http_response(begun)))
    while (part := await channel.receive()) is not None:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _start_of(response: HttpResponse) -> Message:
    headers: list[Any] = [(bytes(name).lower(), bytes(value)) for name, value in response.headers]
    return {"type": "http.response.start", "status": response.status, "headers": headers}
