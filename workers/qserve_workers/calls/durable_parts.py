"""What a durable call gives before its end, and a response that nobody waits for."""

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from qserve.broker.connection import Answer
from qserve.context import CallInfo
from qserve.errors import QServeError, ResultTooLarge, StreamBroken
from qserve.wire.call_record import Part
from qserve.wire.channel import Channel
from qserve.wire.codec import Codec
from qserve.wire.messages import HttpResponse, decode_http_response, encode

REPORTS_AT_ONCE = 100
"""How many reports of progress are on their way at most; a record keeps no more of them."""


@dataclass(eq=False, slots=True)
class DurableCallInfo(CallInfo):
    """The durable call that is being run; `report` tells how far it has come, from any thread."""

    is_last: bool = True
    report: Callable[[object], None] = lambda _: None
    on_chunk: Callable[[object], Awaitable[None]] | None = None


class CollectedResponse(Channel):
    """In place of the channel of a request whose client has left: collects the response, however it is sent."""

    def __init__(self, limit: int, on_part: Callable[[bytes], Awaitable[None]]) -> None:
        super().__init__("", lambda _to, _chunk: None)
        self._limit = limit
        self._on_part = on_part
        self._parts: list[bytes] = []
        self._size = 0
        self._too_large: ResultTooLarge | None = None
        self._closed = asyncio.Event()

    def greet(self) -> None:
        """There is nobody to greet."""

    async def send(self, data: bytes) -> None:
        """Take in the head of a response, then each part of it."""
        self._size += len(data)
        if self._size > self._limit:
            self._too_large = ResultTooLarge(
                f"the response has more than {self._limit:,} bytes, the limit: raise QSERVE_MAX_VALUE_BYTES"
            )
            raise self._too_large
        self._parts.append(data)
        if len(self._parts) > 1 and data:
            await self._on_part(data)

    async def receive_part(self) -> bytes | None:
        """Wait until the response is complete: this client never leaves."""
        await self._closed.wait()
        raise StreamBroken("the response is complete")

    def close(self, error: QServeError) -> None:
        """The response is complete."""
        self._closed.set()

    def check(self) -> None:
        """Raise ResultTooLarge if it was, whatever the application has made of that error."""
        if self._too_large is not None:
            raise self._too_large

    def response(self) -> HttpResponse:
        """What was sent; raises like `check`."""
        self.check()
        head = decode_http_response(self._parts[0])
        return HttpResponse(head.status, head.headers, b"".join(self._parts[1:]))


class Reports:
    """What one attempt of a call reports of its progress, in its order.

    Where it reports faster than Redis takes it, some are left out, but never the last: so nothing piles up here, and
    the end of the call need not wait.

    Args:
        frame_of: Packs what is reported; raises what whoever reports it is told.
        send: Sends a frame, on the event loop that this was made on, and calls its second argument with the answer.
    """

    def __init__(
        self, frame_of: Callable[[object], bytes], send: Callable[[bytes, Callable[[Answer], None]], None]
    ) -> None:
        self._frame_of = frame_of
        self._send = send
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._lock = threading.Lock()
        self._waiting = deque[bytes]()
        self._under_way = 0
        self._is_called = False

    def add(self, value: object) -> None:
        """Report something, from any thread."""
        frame = self._frame_of(value)
        is_here = threading.get_ident() == self._thread
        with self._lock:
            if self._waiting and len(self._waiting) + self._under_way >= REPORTS_AT_ONCE:
                self._waiting[-1] = frame
            else:
                self._waiting.append(frame)
            calls = not (is_here or self._is_called)
            self._is_called = self._is_called or calls
        if is_here:
            self._send_some()  # later it might come behind the end of the call
        elif calls:
            self._loop.call_soon_threadsafe(self._send_some)

    def flush(self) -> None:
        """Send what waits, because the call ends."""
        self._send_some(most=2 * REPORTS_AT_ONCE)

    def _send_some(self, most: int = REPORTS_AT_ONCE) -> None:
        while True:
            with self._lock:
                self._is_called = False
                if not self._waiting or self._under_way >= most:
                    return
                self._under_way += 1
                frame = self._waiting.popleft()
            self._send(frame, self._answered)

    def _answered(self, _answer: Answer) -> None:
        with self._lock:
            self._under_way -= 1
        self._send_some()


class RecordedParts:
    """Records what one attempt of a call gives before its end, one after the other.

    Args:
        limit: Most bytes that are recorded of an attempt.
        record: Puts an encoded Part with its index.
    """

    def __init__(self, attempt: int, codec: Codec, limit: int, record: Callable[[int, bytes], Awaitable[None]]) -> None:
        self._attempt = attempt
        self._codec = codec
        self._limit = limit
        self._record = record
        self._count = self._size = 0

    async def value(self, value: object) -> None:
        """What a generator has yielded."""
        await self._add(self._codec.pack(value, "a chunk of the result"), packed=True)

    async def body(self, data: bytes) -> None:
        """A piece of a response's body."""
        await self._add(data, packed=False)

    async def _add(self, data: bytes, *, packed: bool) -> None:
        self._size += len(data)
        if self._size > self._limit:
            raise ResultTooLarge(
                f"the call has yielded more than {self._limit:,} bytes, the limit: raise QSERVE_MAX_VALUE_BYTES"
            )
        self._count += 1
        await self._record(self._count, encode(Part(self._attempt, self._count, packed, data)))
