"""Calls while they run, and the channels over which they talk to their callers."""

import asyncio
import contextlib
import time
from collections.abc import Callable

from qserve.broker.connection import Answer
from qserve.broker.inboxes import send_chunk
from qserve.broker.instance.presence import CALLER_TTL_MS, alive_for_ms
from qserve.broker.link import Link
from qserve.broker.replica_queue import Entry
from qserve.context import CallInfo
from qserve.errors import (
    BrokerUnavailable,
    StreamBroken,
)
from qserve.failpoints import reach
from qserve.settings import Settings
from qserve.wire.channel import ABORT, CREDIT, DOUBT_S, Channel, Chunk
from qserve.wire.messages import (
    MODEL,
    Call,
    Signer,
    lineage_of,
    request_of,
)

_WATCH_EVERY_S = 2.0
_SILENT_CALLER_MS = 12_000
"""Who was silent for so long gets no more of a stream; it says that it lives every second."""

OpenChannel = Callable[[], Channel]


class RunningCall:
    """A call between its arrival and its answer.

    Attributes:
        early: What answers it as soon as its response is known, should its code go on after that: due, or begun.
    """

    __slots__ = (
        *("began", "call", "channel", "early", "entry", "info"),
        *("needs_thread", "started_at", "streams", "task", "unwanted"),
    )

    def __init__(self, entry: Entry, call: Call, needs_thread: bool) -> None:
        self.entry = entry
        self.call = call
        self.needs_thread = needs_thread
        self.started_at = time.monotonic()
        self.task: asyncio.Task[None] | None = None
        self.channel: Channel | None = None
        self.early: asyncio.Handle | asyncio.Task[None] | None = None
        self.info = info = CallInfo(call.id, entry.deliveries)
        info.lineage = call.id
        if call.meta:
            info.lineage, info.model_id = lineage_of(call), call.meta.get(MODEL, "")
            info.request_id = request_of(call)
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
                channel.close(StreamBroken("the caller's process has ended, so nobody reads what this call sends"))

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
                channel.close(StreamBroken("the stream broke off, because Redis cannot be reached from its replica"))

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
            running.channel.close(StreamBroken("the call has ended and can send nothing more"))
            self._talking.pop(running.call.id, None)

    async def watch_callers(self) -> None:
        """Notice callers that died: who waits for their credit, or for their next message, would wait for ever."""
        while True:
            await asyncio.sleep(_WATCH_EVERY_S if self._talking else self._link.pause_s)
            with contextlib.suppress(BrokerUnavailable):
                for caller in {running.call.reply_to for running in self._talking.values()}:
                    await self._end_if_dead(caller)

    async def _end_if_dead(self, caller: str) -> None:
        left_ms = await alive_for_ms(self._link.sender, self._keys, caller)
        if left_ms > CALLER_TTL_MS - _SILENT_CALLER_MS:
            self._doubted.pop(caller, None)
            return
        if left_ms < 0 and time.monotonic() - self._doubted.setdefault(caller, time.monotonic()) < DOUBT_S:
            return  # the server's clock may have jumped: the caller will say so when it speaks next
        self._doubted.pop(caller, None)
        for running in list(self._talking.values()):
            if running.call.reply_to == caller:
                self._on_deserted(running)
