"""A call while it runs: its payload, the user code it reaches, and the channel it may talk over."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from qserve.broker.clock import RedisClock
from qserve.broker.connection import Answer
from qserve.broker.inboxes import send_chunk
from qserve.broker.link import Link
from qserve.broker.payloads import Payloads
from qserve.broker.presence import CALLER_TTL_MS
from qserve.broker.replica_queue import Entry
from qserve.context import CallInfo
from qserve.errors import (
    BrokerUnavailable,
    GetTimeoutError,
    ResultTooLarge,
    StreamBroken,
)
from qserve.failpoints import reach
from qserve.settings import Settings
from qserve.wire.channel import ABORT, CREDIT, DOUBT_S, Channel, Chunk
from qserve.wire.codec import Codec
from qserve.wire.messages import (
    HTTP,
    HTTP_RESPONSE,
    PYTHON,
    VALUE,
    WEBSOCKET,
    Call,
    HttpRequest,
    HttpResponse,
    Signer,
    decode_http_request,
    encode,
)

_WATCH_EVERY_S = 2.0
_SILENT_CALLER_MS = 12_000
"""Who was silent for so long gets no more of a stream; it says that it lives every second."""

OpenChannel = Callable[[], Channel]


class Code(Protocol):
    """User code as the calls see it."""

    @property
    def only_sync(self) -> bool: ...
    def needs_thread(self, method: str) -> bool: ...
    async def call(self, method: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object: ...
    async def http(self, request: HttpRequest, open_channel: OpenChannel) -> HttpResponse | None: ...
    async def stream(
        self, method: str, args: tuple[object, ...], kwargs: dict[str, object], channel: Channel
    ) -> None: ...
    async def websocket(self, request: HttpRequest, channel: Channel) -> None: ...


class RunningCall:
    """A call between its arrival and its answer."""

    __slots__ = (
        *("began", "call", "channel", "entry", "info"),
        *("needs_thread", "started_at", "streams", "task", "unwanted"),
    )

    def __init__(self, entry: Entry, call: Call, needs_thread: bool) -> None:
        self.entry = entry
        self.call = call
        self.needs_thread = needs_thread
        self.started_at = time.monotonic()
        self.task: asyncio.Task[None] | None = None
        self.channel: Channel | None = None
        self.info = CallInfo(call.id, entry.deliveries)
        self.unwanted = False
        self.began = False
        self.streams = False


class Conversations:
    """The channels of the calls that run here. Belongs to the replica's event loop.

    Args:
        replica: Id of this replica.
        on_streaming: Called when a call's first data is on its way: it is a stream from now on.
        on_deserted: Called for a call that talks to a process which has died.
    """

    def __init__(
        self,
        settings: Settings,
        signer: Signer,
        link: Link,
        replica: str,
        *,
        on_streaming: Callable[[], None],
        on_deserted: Callable[[RunningCall], None],
    ) -> None:
        self._keys = settings.keys
        self._signer = signer
        self._link = link
        self._replica = replica
        self._on_streaming = on_streaming
        self._on_deserted = on_deserted
        self._talking: dict[str, RunningCall] = {}
        self._doubted: dict[str, float] = {}

    def open(self, running: RunningCall) -> Channel:
        """The channel of a call; closed already where nobody wants the call any more."""
        call = running.call

        def check(answer: Answer) -> None:
            if channel.peer_has_left(answer):
                channel.close(StreamBroken("the caller is gone"))

        def transmit(to: str, chunk: Chunk) -> None:
            if chunk.kind not in (CREDIT, ABORT) and not running.streams:
                running.streams = True
                running.info.deadline = None
                self._on_streaming()
            reach("chunk")
            if self._link.sender.is_open:
                send_chunk(self._link.sender, self._keys, self._signer, to, call.id, chunk, check)
                reach("chunk-sent")
            else:
                channel.close(StreamBroken("Redis cannot be reached"))

        channel = running.channel = Channel(self._replica, transmit, call.reply_to)
        self._talking[call.id] = running
        if running.unwanted:
            self.close(running)
        return channel

    def take_chunk(self, call: str, chunk: Chunk) -> bool:
        """Hand a chunk to the call it belongs to; False if that runs here no more."""
        running = self._talking.get(call)
        if running is None or running.channel is None:
            return False
        running.channel.feed(chunk)
        return True

    def close(self, running: RunningCall) -> None:
        """End the channel of a call, if it has one; one opened later is closed at once."""
        running.unwanted = True
        if running.channel is not None:
            running.channel.close(StreamBroken("the call has ended"))
            self._talking.pop(running.call.id, None)

    async def watch_callers(self) -> None:
        """Notice callers that died: who waits for their credit, or for their next message, would wait for ever."""
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            with contextlib.suppress(BrokerUnavailable):
                for caller in {running.call.reply_to for running in self._talking.values()}:
                    await self._end_if_dead(caller)

    async def _end_if_dead(self, caller: str) -> None:
        left_ms = await self._link.sender.call("PTTL", self._keys.alive(caller))
        if left_ms > CALLER_TTL_MS - _SILENT_CALLER_MS:
            self._doubted.pop(caller, None)
            return
        if left_ms < 0 and time.monotonic() - self._doubted.setdefault(caller, time.monotonic()) < DOUBT_S:
            return  # the server's clock may have jumped: the caller will say so when it speaks next
        self._doubted.pop(caller, None)
        for running in list(self._talking.values()):
            if running.call.reply_to == caller:
                self._on_deserted(running)


class Runner:
    """Takes a call to the user's code and brings back what it came to. Belongs to the replica's event loop."""

    def __init__(
        self, settings: Settings, signer: Signer, codec: Codec, *, link: Link, clock: RedisClock, talks: Conversations
    ) -> None:
        self.code: Code
        self._settings = settings
        self._payloads = Payloads(settings.keys, signer, settings.out_of_line_bytes)
        self._codec = codec
        self._link = link
        self._clock = clock
        self._talks = talks

    async def run(self, running: RunningCall) -> tuple[int, bytes]:
        """Kind and payload of the reply.

        Raises:
            GetTimeoutError: Its time was over; it was not run.
            FrameRejected: Its payload is not what it says.
            Exception: What user code raised.
        """
        call = running.call
        payload = call.payload if not call.out_of_line else await self.fetch(call)
        running.info.deadline = running.started_at + self._time_left(running.entry, call)
        if call.kind == PYTHON:
            args, kwargs = self._codec.unpack_call(payload)
            return VALUE, self._codec.pack_result(await self.code.call(call.method, tuple(args), kwargs))
        return await self._converse(running, payload)

    async def _converse(self, running: RunningCall, payload: bytes) -> tuple[int, bytes]:
        """Run a call whose traffic may go over its channel; its reply then says how many parts there were."""
        call = running.call
        if call.kind == HTTP:
            request = self._decode_request(running, payload)
            response = await self.code.http(request, partial(self._talks.open, running))
            if response is not None:
                return HTTP_RESPONSE, self._pack_response(response)
        elif call.kind == WEBSOCKET:
            channel = self._talks.open(running)
            channel.greet()
            await self.code.websocket(self._decode_request(running, payload), channel)
        else:
            args, kwargs = self._codec.unpack_call(payload)
            await self.code.stream(call.method, tuple(args), kwargs, self._talks.open(running))
        return VALUE, b"%d" % (0 if running.channel is None else running.channel.sent)

    def _decode_request(self, running: RunningCall, payload: bytes) -> HttpRequest:
        request = decode_http_request(payload)
        # In logs and for the user's code it has the id that its client knows.
        running.info.request_id = request.request_id or running.call.id
        return request

    def _time_left(self, entry: Entry, call: Call) -> float:
        """Seconds until a call's deadline; raises where it is over."""
        left_ms = call.ttl_ms - self._clock.age_ms(entry.time_ms)
        if left_ms < 0:
            raise GetTimeoutError("the deadline passed before a replica was free; the call was not run")
        return left_ms / 1000

    async def fetch(self, call: Call) -> bytes:
        """The payload of a call that travelled out of line."""
        if not self._link.sender.is_open:
            raise BrokerUnavailable("the call's payload could not be fetched: Redis is away")
        payload = await self._payloads.fetch(self._link.sender, call.id)
        if payload is None:
            raise GetTimeoutError("the call's payload has expired; it was not run")
        reach("payload-fetched")
        return payload

    def _pack_response(self, response: HttpResponse) -> bytes:
        if len(response.body) > self._settings.max_value_bytes:
            most = self._settings.max_value_bytes
            raise ResultTooLarge(f"the response has {len(response.body)} bytes, {most} may travel")
        return encode(response)
