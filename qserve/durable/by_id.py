"""What any process can do with a durable call whose id it knows: ask how it is doing, read its parts, end it."""

import asyncio
from collections.abc import Callable

from qserve.background import spawn
from qserve.broker.connection import Answer
from qserve.broker.inboxes import send_control
from qserve.broker.keys import Keys
from qserve.broker.link import Link
from qserve.broker.records import Records, durable_reply
from qserve.errors import BrokerUnavailable, CallCancelled, FrameRejected, GetTimeoutError, QServeError
from qserve.failpoints import reach
from qserve.wire.call_record import ANYONE, CANCELLED, EXPIRED, HAS_EXPIRED, PART, CallRecord, Part, decode_part
from qserve.wire.messages import ERROR, Control, ErrorInfo, Reply, Signer, decode_reply, encode

_AWAY = "Redis cannot be reached now; the call goes on: ask again in a moment"

PARTS_READ = 64
"""How many parts are read at once at most, so that a reader does not hold much data."""


class CallsById:
    """Reads and ends durable calls, whichever process has submitted them. Belongs to the event loop of its client.

    Args:
        link: The connection for commands.
    """

    def __init__(self, records: Records, keys: Keys, signer: Signer, link: Link) -> None:
        self._records = records
        self._keys = keys
        self._signer = signer
        self._link = link

    def open(self, frame: bytes, call_id: str) -> Reply:
        """Verify and decode a reply to a durable call.

        Raises:
            FrameRejected, msgspec.DecodeError: It is no reply, or the reply to another call.
        """
        reply = decode_reply(self._signer.open(frame))
        if reply.to != ANYONE or reply.id != call_id:
            raise FrameRejected("the result of another call")
        return reply

    async def describe(self, call_id: str, after_event: int = 0) -> CallRecord | None:
        """Read the record of a call; None if there is none, or none any more.

        Raises:
            BrokerUnavailable: Redis cannot be asked.
        """
        sender = await self._link.first_sender()
        if not sender.is_open:
            raise BrokerUnavailable(_AWAY)
        record = await self._records.describe(sender, call_id, after_event)
        if record is None or not record.is_late:
            return record
        expired: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def noticed(_: Answer) -> None:
            if not expired.done():
                expired.set_result(None)

        self.expire(call_id, noticed)
        await expired
        return await self._records.describe(sender, call_id, after_event)

    async def parts(self, record: CallRecord, after: int) -> list[tuple[int, float, Part]]:
        """Read the next parts of a call, those after a number: at most PARTS_READ, and fewer only if there are no more.

        Raises:
            BrokerUnavailable: Redis cannot be asked.
            FrameRejected: A part does not belong to the call.
        """
        sender = self._link.sender
        if not sender.is_open:
            raise BrokerUnavailable(_AWAY)
        found = await self._records.parts(sender, record, after, PARTS_READ) if record.has_parts else []
        return [(number, at, self._open_part(frame, record)) for number, at, frame in found]

    def _open_part(self, frame: bytes, record: CallRecord) -> Part:
        reply = self.open(frame, record.id)
        part = decode_part(reply.payload) if reply.kind == PART else None
        if part is None or part.attempt != record.attempts:
            raise FrameRejected("no part of this attempt")
        return part

    def cancel(self, call_id: str, on_answer: Callable[[Answer], None] | None = None) -> None:
        """Cancel a call. One that waits never runs; one that runs is stopped if asynchronous, and not run again."""
        self._end_call(call_id, CANCELLED, CallCancelled("the call was cancelled"), on_answer)

    def expire(self, call_id: str, on_answer: Callable[[Answer], None] | None = None) -> None:
        """End a call that has expired."""
        self._end_call(call_id, EXPIRED, GetTimeoutError(HAS_EXPIRED), on_answer)

    def _end_call(
        self, call_id: str, state: str, error: QServeError, on_answer: Callable[[Answer], None] | None
    ) -> None:
        sender = self._link.sender
        if self._link.is_coming:
            spawn(self._end_once_connected(call_id, state, error, on_answer))
            return
        if not sender.is_open:
            if on_answer is not None:
                on_answer(BrokerUnavailable(_AWAY))
            return

        def check(answer: Answer) -> None:
            if isinstance(answer, list):
                replica, entry, _ = (part.decode() for part in answer)
                send_control(self._link.sender, self._keys, self._signer, replica, Control("cancel", entry), call_id)
            if on_answer is not None:
                on_answer(answer)

        info = ErrorInfo(error.code, type(error).__name__, type(error).__module__, str(error))
        reach("end-call")
        self._records.end(sender, call_id, state, durable_reply(self._signer, call_id, ERROR, encode(info)), check)
        reach("end-call-sent")

    async def _end_once_connected(
        self, call_id: str, state: str, error: QServeError, on_answer: Callable[[Answer], None] | None
    ) -> None:
        await self._link.first_sender()
        self._end_call(call_id, state, error, on_answer)
