"""Durable calls in a replica: what their records say before they run, and what is written there when they end."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from qserve.broker.connection import Answer
from qserve.broker.link import Link
from qserve.broker.payloads import Payloads, result_id
from qserve.broker.records import Records, durable_reply
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.replica_queue import Entry
from qserve.context import CallInfo, current_call
from qserve.errors import (
    BrokerUnavailable,
    CallCancelled,
    FrameRejected,
    GetTimeoutError,
    PayloadTooLarge,
    QServeError,
    ResultTooLarge,
    StreamBroken,
    ValueNotSerializable,
)
from qserve.failpoints import reach
from qserve.settings import Settings
from qserve.wire.call_record import (
    CANCELLED,
    DEAD,
    DEAD_TTL_S,
    DONE,
    EXPIRED,
    FAILED,
    NEWS,
    PART,
    PROGRESS,
    SCHEDULED,
    DurableCall,
    Part,
)
from qserve.wire.channel import Channel
from qserve.wire.codec import Codec
from qserve.wire.messages import (
    ERROR,
    HTTP,
    HTTP_RESPONSE,
    PYTHON,
    VALUE,
    Call,
    HttpRequest,
    HttpResponse,
    Signer,
    decode_http_request,
    decode_http_response,
    encode,
)
from qserve_workers.celery_calls.celery_results import celery_error, celery_result
from qserve_workers.replica.user_entry import text_of, what_was_raised

logger = logging.getLogger(__name__)

_NEXT_TRY_S = 0.2
_LARGEST_PROGRESS = 64 * 1024


class Code(Protocol):
    """User code as durable calls see it."""

    async def call(self, method: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object: ...
    async def http(self, request: HttpRequest, open_channel: Callable[[], Channel]) -> HttpResponse | None: ...


class Host(Protocol):
    """The consumer as durable calls see it."""

    async def fetch(self, call: Call) -> bytes:
        """A payload that travelled out of line."""

    def is_running(self, entry: bytes) -> bool:
        """Whether a call is still this replica's."""

    def note_rejected(self, error: Exception) -> None:
        """Count what is no message of ours."""

    def release(self, entry: bytes, *, counts: bool) -> None:
        """A call has ended here; `counts`: it ran."""


@dataclass(eq=False, slots=True)
class DurableCallInfo(CallInfo):
    """The durable call that is being run; `report` tells how far it has come, from any thread."""

    report: Callable[[object], None] = lambda _: None
    on_chunk: Callable[[object], Awaitable[None]] | None = None


class Running(Protocol):
    """A call between its arrival and its answer."""

    entry: Entry
    info: CallInfo
    began: bool
    unwanted: bool


class CollectedResponse(Channel):
    """In place of the channel of a request whose client has left: collects the response, however it is sent."""

    def __init__(self, limit: int, on_part: Callable[[bytes], Awaitable[None]]) -> None:
        super().__init__("", lambda _to, _chunk: None)
        self._limit = limit
        self._on_part = on_part
        self._parts: list[bytes] = []
        self._size = 0
        self._closed = asyncio.Event()

    def greet(self) -> None:
        """There is nobody to greet."""

    async def send(self, data: bytes) -> None:
        """Take in the head of a response, then each part of it."""
        self._size += len(data)
        if self._size > self._limit:
            raise ResultTooLarge(f"the response has more than {self._limit} bytes, which is all that is kept of one")
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

    def response(self) -> HttpResponse:
        """What was sent."""
        head = decode_http_response(self._parts[0])
        return HttpResponse(head.status, head.headers, b"".join(self._parts[1:]))


class _Settlement(NamedTuple):
    call: DurableCall
    state: str
    frame: bytes
    keep_ms: int
    error: str
    result: bytes | None  # sealed, out of line
    celery: bytes


class DurableRuns:
    """Runs durable calls and settles them. Belongs to the replica's event loop.

    A settlement whose confirmation is lost with the connection is sent again: only the first one for an entry counts.
    """

    def __init__(self, settings: Settings, signer: Signer, codec: Codec, replica: str, link: Link, host: Host) -> None:
        self._settings = settings
        self._signer = signer
        self._payloads = Payloads(settings.keys, signer, settings.out_of_line_bytes)
        self._codec = codec
        self._replica = replica
        self._link = link
        self._host = host
        self._records = Records(settings.keys)
        self._unconfirmed: dict[bytes, _Settlement] = {}
        self.on_retry: Callable[[float], None] = lambda _: None
        """Called with the seconds after which a call is to run again."""

    async def run(self, running: Running, call: DurableCall, code: Code) -> None:
        """Run a call that this replica has taken: all of its outcomes."""
        ran, entry = False, running.entry
        try:
            verdict, *facts = await self._note_start(entry, call)
            if verdict == b"run":
                reach("run-noted")
                ran = True
                attempt, failures = facts
                parts = self._parts(entry, call, attempt)
                report = self._reporter(entry, call)
                running.info = DurableCallInfo(call.id, attempt, report=report, on_chunk=parts.value)
                await self._run(running, call, code, failures, parts)
            elif verdict == b"cancelled":
                self._settle(entry, call, CANCELLED, facts[0])
            elif verdict == b"expired":
                error = GetTimeoutError("the call expired before a replica was free; it was not run")
                self._settle(entry, call, EXPIRED, self._error_frame(call, error))
        finally:
            if self._host.is_running(entry.id):
                self._host.release(entry.id, counts=ran)

    async def _note_start(self, entry: Entry, call: DurableCall) -> list[Any]:
        while self._host.is_running(entry.id):
            try:
                return await self._records.run(self._link.sender, call, self._replica, entry.id)
            except (BrokerUnavailable, CommandRefused) as exc:
                logger.warning("could not note that call %s runs: %s", call.id, exc)
            await asyncio.sleep(_NEXT_TRY_S)
        return [b"lost"]

    async def _run(self, running: Running, call: DurableCall, code: Code, failures: int, parts: "_Parts") -> None:
        entry = running.entry
        current_call.set(running.info)
        running.began = True
        try:
            if running.unwanted:
                raise asyncio.CancelledError
            payload = call.payload if not call.out_of_line else await self._host.fetch(call)
            if call.kind == HTTP:
                request = decode_http_request(payload)
                running.info.request_id = request.request_id or call.id
                kind, result = HTTP_RESPONSE, await self._run_http(request, code, parts)
            elif call.kind == PYTHON:
                args, kwargs = self._codec.unpack_call(payload)
                kind, result = VALUE, self._codec.pack_result(await code.call(call.method, tuple(args), kwargs))
            else:
                raise ValueNotSerializable("a stream cannot be a durable call")
        except asyncio.CancelledError:
            if self._host.is_running(entry.id):  # else abandoned or taken over: somebody else settles it
                self._settle(entry, call, CANCELLED, self._error_frame(call, CallCancelled("the call was cancelled")))
            return
        except BaseException as exc:  # packing a result runs user code, too
            if isinstance(exc, FrameRejected):
                self._host.note_rejected(exc)
            self._failed(entry, call, what_was_raised(exc), failures + 1)
            return
        if self._host.is_running(entry.id):
            try:
                celery = celery_result(self._codec.unpack(result)) if call.terms.celery_id else b""
            except QServeError as exc:
                self._failed(entry, call, exc, failures + 1)
                return
            self._settle(entry, call, DONE, *self._frame(call, kind, result), celery=celery)

    async def _run_http(self, request: HttpRequest, code: Code, parts: "_Parts") -> bytes:
        collected: list[CollectedResponse] = []

        def open_channel() -> Channel:
            collected.append(CollectedResponse(self._settings.max_value_bytes, parts.body))
            return collected[-1]

        response = await code.http(request, open_channel)
        packed = encode(response if response is not None else collected[0].response())
        if len(packed) > self._settings.max_value_bytes:
            raise ResultTooLarge(f"the response has {len(packed)} bytes, {self._settings.max_value_bytes} may travel")
        return packed

    def _failed(self, entry: Entry, call: DurableCall, error: BaseException, failures: int) -> None:
        if not self._host.is_running(entry.id):
            return
        if not isinstance(error, Exception) or (call.kind == HTTP and not isinstance(error, QServeError)):
            logger.error("Exception in deployment %r, call %s", call.deployment, call.id, exc_info=error)
        said = f"{type(error).__name__}: {text_of(error)}"
        if failures <= call.terms.retries and call.terms.retries_after(error):
            pause_ms = call.terms.pause_ms(failures)
            self._settle(entry, call, SCHEDULED, b"", keep_ms=pause_ms, error=said)
            self.on_retry(pause_ms / 1000)
            return
        exhausted = call.terms.retries > 0 and call.terms.retries_after(error)
        state = DEAD if exhausted else FAILED
        frame = self._frame(call, ERROR, self._pack_error(error))
        self._settle(entry, call, state, *frame, error=said, celery=celery_error(call, error))

    def bury(self, entry: Entry, call: DurableCall, reason: str, error: QServeError) -> None:
        """Give up on a call that killed every replica it was given to."""
        logger.error("gave up on call %s: %s", call.id, reason)
        frame = self._error_frame(call, error)
        self._settle(entry, call, DEAD, frame, error=reason, celery=celery_error(call, error))

    async def reject(self, entry: Entry, deployment: str, error: Exception) -> None:
        """Give up an entry that is no call of ours, and with it the call that it stood for."""
        if not self._link.sender.is_open:
            return  # still pending for this replica: the next link finds it
        frame = durable_reply(self._signer, entry.call.decode(errors="replace"), ERROR, self._pack_error(error))
        try:
            await self._records.reject(self._link.sender, deployment, entry, f"rejected: {error}", frame)
        except (BrokerUnavailable, CommandRefused) as exc:
            logger.warning("could not give up entry %s: %s", entry.id, exc)

    # Settling

    def _settle(
        self,
        entry: Entry,
        call: DurableCall,
        state: str,
        frame: bytes,
        result: bytes | None = None,
        *,
        keep_ms: int | None = None,
        error: str = "",
        celery: bytes = b"",
    ) -> None:
        if keep_ms is None:
            keep_ms = int((DEAD_TTL_S if state == DEAD else call.terms.result_ttl_s) * 1000)
        self._unconfirmed[entry.id] = _Settlement(call, state, frame, keep_ms, error, result, celery)
        self._send(entry.id)

    def _send(self, entry: bytes) -> None:
        sender, settlement = self._link.sender, self._unconfirmed.get(entry)
        if not sender.is_open or settlement is None:
            return
        reach("settle")
        if settlement.result is not None:
            self._payloads.put(sender, result_id(settlement.call.id), settlement.result, settlement.keep_ms)
        self._records.settle(
            sender,
            settlement.call,
            entry,
            state=settlement.state,
            frame=settlement.frame,
            keep_ms=settlement.keep_ms,
            error=settlement.error,
            celery=settlement.celery,
            on_answer=partial(self._confirmed, entry),
        )
        reach("settle-sent")

    def _confirmed(self, entry: bytes, answer: Answer) -> None:
        if isinstance(answer, CommandRefused):
            logger.error("Redis refused the result of a durable call, which will be sent again: %s", answer)
            asyncio.get_running_loop().call_later(1.0, self._send, entry)
        elif not isinstance(answer, Exception):  # else the connection is lost; `resend` follows
            reach("settled")
            self._unconfirmed.pop(entry, None)

    def resend(self) -> None:
        """Send again, on a new connection, what the last one did not confirm."""
        self._records.open(self._link.sender)
        for entry in list(self._unconfirmed):
            self._send(entry)

    @property
    def settled(self) -> Iterable[bytes]:
        """Entries that are settled, but not yet confirmed to be."""
        return self._unconfirmed

    @property
    def unconfirmed(self) -> bool:
        """Whether a settlement may not have arrived."""
        return bool(self._unconfirmed)

    # Frames

    def _frame(self, call: DurableCall, kind: int, payload: bytes) -> tuple[bytes, bytes | None]:
        sealed = self._payloads.seal_result(call.id, payload)
        if sealed is None:
            return durable_reply(self._signer, call.id, kind, payload), None
        return durable_reply(self._signer, call.id, kind, b"", out_of_line=True), sealed

    def _error_frame(self, call: DurableCall, error: QServeError) -> bytes:
        return durable_reply(self._signer, call.id, ERROR, self._pack_error(error))

    def _pack_error(self, error: BaseException) -> bytes:
        return encode(self._codec.pack_error(error))

    def _reporter(self, entry: Entry, call: DurableCall) -> Callable[[object], None]:
        loop = asyncio.get_running_loop()

        def report(value: object) -> None:
            packed = self._codec.pack(value, "the progress")
            if len(packed) > _LARGEST_PROGRESS:
                raise PayloadTooLarge(f"the progress takes {len(packed):,} bytes, the limit is {_LARGEST_PROGRESS:,}")
            frame = durable_reply(self._signer, call.id, PROGRESS, packed)
            loop.call_soon_threadsafe(self._send_progress, entry.id, call.id, frame)

        return report

    def _parts(self, entry: Entry, call: DurableCall, attempt: int) -> "_Parts":
        async def record(index: int, part: bytes) -> None:
            frame = durable_reply(self._signer, call.id, PART, part)
            news = durable_reply(self._signer, call.id, NEWS, b"")
            while self._host.is_running(entry.id):
                try:
                    await self._records.part(self._link.sender, call.id, entry.id, index, frame, news)
                    return
                except (BrokerUnavailable, CommandRefused) as exc:
                    logger.warning("could not record a part of call %s: %s", call.id, exc)
                await asyncio.sleep(_NEXT_TRY_S)

        return _Parts(attempt, self._codec, self._settings.max_value_bytes, record)

    def _send_progress(self, entry: bytes, call_id: str, frame: bytes) -> None:
        if entry not in self._unconfirmed:
            self._records.progress(self._link.sender, call_id, entry, frame)


class _Parts:
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
            raise ResultTooLarge(f"the call has given more than {self._limit} bytes, which is all that is kept of one")
        self._count += 1
        await self._record(self._count, encode(Part(self._attempt, self._count, packed, data)))
