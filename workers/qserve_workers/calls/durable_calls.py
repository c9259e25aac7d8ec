"""Durable calls in a replica: what their records say before they run, and what is written there when they end."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from qserve.broker.connection import Answer
from qserve.broker.link import Link
from qserve.broker.payloads import LARGEST_STORED, Payloads
from qserve.broker.records import Records, durable_reply
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.replica_queue import Entry
from qserve.broker.server.clock import RedisClock
from qserve.context import current_call
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
from qserve.hooks import HookChain, ReplicaHook
from qserve.settings import Settings
from qserve.wire.call_record import (
    CANCELLED,
    DEAD,
    DEAD_TTL_S,
    DONE,
    EXPIRED,
    HAS_EXPIRED,
    NEWS,
    PART,
    PROGRESS,
    SCHEDULED,
    DurableCall,
)
from qserve.wire.channel import Channel
from qserve.wire.codec import Codec
from qserve.wire.exceptions import text_of
from qserve.wire.messages import (
    ERROR,
    HTTP,
    HTTP_RESPONSE,
    PYTHON,
    VALUE,
    HttpRequest,
    Signer,
    decode_http_request,
    encode,
)
from qserve.wire.parts import flat
from qserve_workers.calls.answers import Answers
from qserve_workers.calls.arrivals import fetch_payload
from qserve_workers.calls.call_hooks import with_hooks
from qserve_workers.calls.durable_parts import CollectedResponse, DurableCallInfo, RecordedParts, Reports
from qserve_workers.calls.running import RunningCall
from qserve_workers.calls.slots import Slots
from qserve_workers.celery_calls.celery_results import celery_error, celery_result
from qserve_workers.user.user_code import UserCode
from qserve_workers.user.user_entry import what_was_raised

logger = logging.getLogger(__name__)

_NEXT_TRY_S = 0.2
_LARGEST_PROGRESS = 64 * 1024


class _Settlement(NamedTuple):
    call: DurableCall
    attempt: int | None
    state: str
    frame: bytes
    keep_ms: int
    error: str
    result: bytes | None  # sealed, out of line
    celery: bytes


class DurableRuns:
    """Runs durable calls and settles them. Belongs to the replica's event loop.

    A settlement whose confirmation is lost with the connection is sent again: only the first one for an entry counts.

    Args:
        on_retry: Called with the seconds after which a call is to run again.
    """

    def __init__(
        self,
        settings: Settings,
        signer: Signer,
        codec: Codec,
        replica: str,
        link: Link,
        slots: Slots,
        answers: Answers,
        *,
        clock: RedisClock,
        hooks: HookChain[ReplicaHook] | None,
        on_retry: Callable[[float], None],
    ) -> None:
        self._max_bytes = min(settings.max_value_bytes, LARGEST_STORED)
        self._signer = signer
        self._payloads = Payloads(settings.keys, signer, settings.out_of_line_bytes)
        self._codec = codec
        self._replica = replica
        self._link = link
        self._slots = slots
        self._answers = answers
        self._on_retry = on_retry
        self._run_plain, self._run_told = with_hooks(self._run_user_code, hooks, clock)
        self._records = Records(settings.keys)
        self._unconfirmed: dict[bytes, _Settlement] = {}

    async def run(self, running: RunningCall, call: DurableCall, code: UserCode) -> None:
        """Run a call that this replica has taken: all of its outcomes."""
        ran, entry = False, running.entry
        try:
            verdict, *facts = await self._note_start(entry, call)
            if verdict == b"run":
                reach("run-noted")
                ran = True
                attempt, failures = facts
                parts = self._parts(entry, call, attempt)
                reports = self._reports(entry, call, attempt)
                lineage = running.info.lineage
                model, is_last = running.info.model_id, failures >= call.terms.retries
                running.info = DurableCallInfo(
                    *(call.id, attempt),
                    lineage=lineage,
                    model_id=model,
                    is_last=is_last,
                    report=reports.add,
                    on_chunk=parts.value,
                )
                await self._run(running, call, code, failures, parts, reports)
            elif verdict == b"cancelled":
                self._settle(entry, call, CANCELLED, facts[0])
            elif verdict == b"expired":
                error = GetTimeoutError(HAS_EXPIRED)
                self._settle(entry, call, EXPIRED, self._error_frame(call, error))
        finally:
            self._slots.give_back(running, ran=ran)

    async def _note_start(self, entry: Entry, call: DurableCall) -> list[Any]:
        while entry.id in self._slots:
            try:
                return await self._records.run(self._link.sender, call, self._replica, entry.id)
            except (BrokerUnavailable, CommandRefused) as exc:
                logger.warning("could not note that call %s runs: %s", call.id, exc)
            await asyncio.sleep(_NEXT_TRY_S)
        return [b"lost"]

    async def _run(
        self,
        running: RunningCall,
        call: DurableCall,
        code: UserCode,
        failures: int,
        parts: RecordedParts,
        reports: Reports,
    ) -> None:
        entry, attempt = running.entry, running.info.attempt
        current_call.set(running.info)
        running.began = True
        try:
            if running.unwanted:
                raise asyncio.CancelledError
            run = self._run_told if call.meta else self._run_plain
            try:
                kind, result = await run(running, code, parts)
            finally:
                reports.flush()
        except asyncio.CancelledError as exc:
            if entry.id not in self._slots:
                return  # abandoned or taken over: somebody else settles it
            if running.unwanted:
                self._slots.counts.others["cancelled"] += 1
                self._settle(entry, call, CANCELLED, self._error_frame(call, CallCancelled("the call was cancelled")))
            else:  # by user code, as in `OrdinaryRuns.run`
                self._failed(entry, call, attempt, exc, failures + 1)
            return
        except BaseException as exc:  # packing a result runs user code, too
            if isinstance(exc, FrameRejected):
                self._answers.note_rejected(exc)
            self._failed(entry, call, attempt, what_was_raised(exc), failures + 1)
            return
        if entry.id in self._slots:
            try:
                celery = celery_result(self._codec.unpack(result)) if call.terms.celery_id else b""
            except QServeError as exc:
                self._failed(entry, call, attempt, exc, failures + 1)
                return
            self._settle(entry, call, DONE, *self._frame(call, kind, result), attempt=attempt, celery=celery)

    async def _run_user_code(self, running: RunningCall, code: UserCode, parts: RecordedParts) -> tuple[int, bytes]:
        """Kind and payload of the result; raises what user code raised."""
        call, entry = running.call, running.entry.id
        payload = call.payload
        if call.out_of_line:
            payload = await fetch_payload(
                self._payloads, self._link, call, lambda: entry in self._slots and not running.unwanted
            )
        if call.kind == HTTP:
            request = decode_http_request(payload)
            running.info.request_id = request.request_id or call.id
            return HTTP_RESPONSE, await self._run_http(request, code, parts)
        if call.kind == PYTHON:
            args, kwargs = self._codec.unpack_call(payload)
            result = self._codec.pack_result(await code.call(call.method, tuple(args), kwargs), whole=True)
            if len(result) > self._max_bytes:
                raise ResultTooLarge(
                    f"the result takes {len(result):,} bytes when packed, the limit is {self._max_bytes:,}"
                )
            return VALUE, flat(result)
        raise ValueNotSerializable("a stream cannot be a durable call")

    async def _run_http(self, request: HttpRequest, code: UserCode, parts: RecordedParts) -> bytes:
        collected: list[CollectedResponse] = []

        def open_channel() -> Channel:
            collected.append(CollectedResponse(self._max_bytes, parts.body))
            return collected[-1]

        try:
            response = await code.http(request, open_channel)
        except StreamBroken:
            for each in collected:
                each.check()
            raise
        packed = encode(response if response is not None else collected[0].response())
        if len(packed) > self._max_bytes:
            raise ResultTooLarge(
                f"the response has {len(packed):,} bytes, and the limit is {self._max_bytes:,}: "
                "raise QSERVE_MAX_VALUE_BYTES"
            )
        return packed

    def _failed(self, entry: Entry, call: DurableCall, attempt: int, error: BaseException, failures: int) -> None:
        if entry.id not in self._slots:
            return
        if not isinstance(error, Exception) or (call.kind == HTTP and not isinstance(error, QServeError)):
            logger.error("Exception in deployment %r, call %s", call.deployment, call.id, exc_info=error)
        self._slots.counts.others["failed"] += 1
        said = f"{type(error).__name__}: {text_of(error)}"
        state = call.terms.state_after(error, failures)
        if state == SCHEDULED:
            pause_ms = call.terms.pause_ms(failures)
            self._settle(entry, call, SCHEDULED, b"", attempt=attempt, keep_ms=pause_ms, error=said)
            self._slots.counts.retries["failed"] += 1
            self._on_retry(pause_ms / 1000)
            return
        frame = self._frame(call, ERROR, self._pack_error(error))
        self._settle(entry, call, state, *frame, attempt=attempt, error=said, celery=celery_error(call, error))

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
        attempt: int | None = None,
        keep_ms: int | None = None,
        error: str = "",
        celery: bytes = b"",
    ) -> None:
        if keep_ms is None:
            keep_ms = int((DEAD_TTL_S if state == DEAD else call.terms.result_ttl_s) * 1000)
        self._unconfirmed[entry.id] = _Settlement(call, attempt, state, frame, keep_ms, error, result, celery)
        self._send(entry.id)

    def _send(self, entry: bytes) -> None:
        sender, settlement = self._link.sender, self._unconfirmed.get(entry)
        if not sender.is_open or settlement is None:
            return
        reach("settle")
        if settlement.result is not None:
            self._payloads.put_result(sender, settlement.call.id, settlement.result, by=self._replica)
        self._records.settle(
            sender,
            settlement.call,
            entry,
            state=settlement.state,
            frame=settlement.frame,
            stored_by=self._replica if settlement.result is not None else "",
            attempt=settlement.attempt,
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

    def _reports(self, entry: Entry, call: DurableCall, attempt: int) -> Reports:
        def frame_of(value: object) -> bytes:
            packed = self._codec.pack(value, "the progress")
            if len(packed) > _LARGEST_PROGRESS:
                raise PayloadTooLarge(f"the progress takes {len(packed):,} bytes, the limit is {_LARGEST_PROGRESS:,}")
            return durable_reply(self._signer, call.id, PROGRESS, packed)

        def send(frame: bytes, on_answer: Callable[[Answer], None]) -> None:
            if entry.id not in self._unconfirmed:
                self._records.progress(self._link.sender, call.id, entry.id, attempt, frame, on_answer)

        return Reports(frame_of, send)

    def _parts(self, entry: Entry, call: DurableCall, attempt: int) -> RecordedParts:
        async def record(index: int, part: bytes) -> None:
            frame = durable_reply(self._signer, call.id, PART, part)
            news = durable_reply(self._signer, call.id, NEWS, b"")
            while entry.id in self._slots:
                try:
                    await self._records.part(self._link.sender, call.id, entry.id, attempt, index, frame, news)
                    return
                except (BrokerUnavailable, CommandRefused) as exc:
                    logger.warning("could not record a part of call %s: %s", call.id, exc)
                await asyncio.sleep(_NEXT_TRY_S)

        return RecordedParts(attempt, self._codec, self._max_bytes, record)
