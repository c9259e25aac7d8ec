"""The calling side of durable calls: submit them, wait for any of them, cancel them."""

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import get_args

import msgspec

from qserve.background import spawn
from qserve.broker.call_queue import CALLS_PER_ADMIT
from qserve.broker.confirming import Confirmed
from qserve.broker.connection import Answer
from qserve.broker.inboxes import send_control
from qserve.broker.link import Link
from qserve.broker.payloads import Payloads, result_id
from qserve.broker.records import Records, durable_reply, submit_arguments
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.refusals import FullQueues, refusal_of_all
from qserve.errors import (
    BrokerUnavailable,
    CallCancelled,
    CallNotFound,
    FrameRejected,
    GetTimeoutError,
    IdempotencyConflict,
    QServeError,
)
from qserve.failpoints import reach
from qserve.settings import Settings
from qserve.wire.call_record import (
    ANYONE,
    CANCELLED,
    EXPIRED,
    NEVER_MS,
    NEWS,
    PART,
    PROGRESS,
    CallRecord,
    Durability,
    DurableCall,
    DurableOptions,
    Part,
    decode_part,
    durable_with_meta,
    new_call_id,
)
from qserve.wire.messages import (
    ERROR,
    NO_META,
    Control,
    ErrorInfo,
    Outcome,
    Reply,
    Signer,
    decode_reply,
    encode,
)

OnAdmitted = Callable[[str | QServeError], None]

_LOOK_AGAIN_S = 30.0
"""An inbox is told of every end; looking again now and then finds what was missed while the inbox counted as dead."""
_EXPIRY_SHOWS_S = 0.05
PARTS_READ = 64
"""Of how many parts at most a reader holds the data."""


class Submission:
    """A durable call that is ready to be submitted."""

    __slots__ = ("call", "frame", "on_admitted", "options", "payload")

    def __init__(
        self, call: DurableCall, frame: bytes, payload: bytes | None, options: DurableOptions, on_admitted: OnAdmitted
    ) -> None:
        self.call = call
        self.frame = frame
        self.payload = payload  # travels out of line, or None
        self.options = options
        self.on_admitted = on_admitted


class CallWatcher:
    """Somebody in this process who waits for a durable call."""

    __slots__ = ("on_news", "on_outcome", "on_progress")

    def __init__(
        self,
        on_outcome: Callable[[Outcome], None],
        on_progress: Callable[[bytes], None],
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        self.on_news = on_news
        self.on_outcome = on_outcome
        self.on_progress = on_progress


class DurableCalls:
    """Submits durable calls and learns of their ends. Belongs to its client's loop.

    Guarantees: a submission that was confirmed survives every process but Redis. Submitting is repeated after a lost
    connection, because a call that is there already is not put again. Each watcher gets one outcome.

    Args:
        process: Id of the inbox that gets the outcomes.
        link: The connection for commands.
        full_queues: The errors for calls that found a full queue.
    """

    def __init__(
        self,
        settings: Settings,
        signer: Signer,
        payloads: Payloads,
        process: str,
        link: Link,
        full_queues: FullQueues,
    ) -> None:
        self.records = Records(settings.keys)
        self._settings = settings
        self._keys = settings.keys
        self._signer = signer
        self._payloads = payloads
        self._process = process
        self._link = link
        self._full_queues = full_queues
        self._collected: dict[str, list[Submission]] = {}
        self._unconfirmed: dict[str, Submission] = {}
        self._watchers: dict[str, list[CallWatcher]] = {}
        self._look_at = time.monotonic() + _LOOK_AGAIN_S
        self._confirmed = {each: Confirmed(settings.redis_url, each) for each in get_args(Durability)}
        self._stopped = False

    # Submitting

    def prepare(
        self,
        deployment: str,
        *,
        kind: int,
        method: str,
        payload: bytes,
        options: DurableOptions,
        on_admitted: OnAdmitted,
        meta: Mapping[str, str] = NO_META,
    ) -> Submission:
        """Make a call ready to be submitted. From any thread.

        Args:
            on_admitted: Called exactly once, on the loop: with the call's id, which is an earlier call's where that
                has the same idempotency key, or with the reason why it was refused.
            meta: What hooks of this process say to those of the replica.
        """
        call_id = new_call_id()
        sealed = self._payloads.seal(call_id, payload)
        if sealed is not None:
            payload = b""
        head = (call_id, deployment, ANYONE, NEVER_MS, kind, method, True, payload, sealed is not None)
        call = DurableCall(*head, terms=options.terms)
        if meta:
            call = durable_with_meta(call, meta)
        return Submission(call, self._signer.seal(encode(call)), sealed, options, on_admitted)

    def submit(self, submission: Submission) -> None:
        """Submit a prepared call, together with the others of this tick."""
        if self._stopped:
            submission.on_admitted(BrokerUnavailable("the client is stopped"))
            return
        durability = submission.options.durability or self._settings.durability
        if durability != "memory":
            spawn(self._submit_confirmed(submission, durability))
            return
        self._unconfirmed[submission.call.id] = submission
        if not self._collected:
            asyncio.get_running_loop().call_soon(self._flush)
        self._collected.setdefault(submission.call.deployment, []).append(submission)

    async def _submit_confirmed(self, each: Submission, durability: Durability) -> None:
        call = each.call
        try:
            if not (sender := self._link.sender).is_open:
                raise BrokerUnavailable("Redis cannot be reached")
            if each.payload is not None:
                await self._payloads.store_unconfirmed(sender, call.id, each.payload)
            arguments = submit_arguments(self._keys, call.deployment, [(call, each.frame, each.options)], self._process)
            answer = await self._confirmed[durability].submit(arguments)
        except (BrokerUnavailable, CommandRefused) as exc:
            text = f"call {call.id} was not confirmed with durability={durability!r}: {exc}. It may be stored and run, "
            each.on_admitted(BrokerUnavailable(f"{text}or be lost: `serve.get_ref({call.id!r})` tells"))
            return
        self._admitted(each, answer, 0)

    def _flush(self) -> None:
        sender = self._link.sender
        if not sender.is_open or not self._collected:
            return  # `link_up` or `link_down` goes on
        reach("submit")
        collected, self._collected = self._collected, {}
        for deployment, submissions in collected.items():
            for start in range(0, len(submissions), CALLS_PER_ADMIT):
                batch = submissions[start : start + CALLS_PER_ADMIT]
                for each in batch:
                    if each.payload is not None:
                        self._payloads.put_unconfirmed(sender, each.call.id, each.payload)
                calls = [(each.call, each.frame, each.options) for each in batch]
                self.records.submit(sender, deployment, calls, self._process, partial(self._answered, batch))
        sender.flush()
        reach("submit-sent")

    def _answered(self, batch: list[Submission], answer: Answer) -> None:
        if isinstance(answer, BrokerUnavailable):
            return  # the connection is lost: `link_up` asks again
        reach("submitted")
        for place, each in enumerate(batch):
            if self._unconfirmed.pop(each.call.id, None) is not None:
                self._admitted(each, answer, place)

    def _admitted(self, each: Submission, answer: Answer, place: int) -> None:
        if each.options.expires_s is not None:  # nobody tells of a call that no replica looks at
            later = each.options.expires_s + _EXPIRY_SHOWS_S
            asyncio.get_running_loop().call_later(later, self._look_if_watched, each.call.id)
        each.on_admitted(_verdict(each.call, answer, place, self._full_queues))

    def _look_if_watched(self, call_id: str) -> None:
        if call_id in self._watchers:
            self._look(call_id)

    # Waiting

    def watch(self, call_id: str, watcher: CallWatcher) -> None:
        """Be told of the end of a call that this client submits."""
        self._watchers.setdefault(call_id, []).append(watcher)

    def attach(self, call_id: str, watcher: CallWatcher) -> None:
        """Be told of the end of any call, at once if it has ended."""
        self.watch(call_id, watcher)
        self._look(call_id)

    def forget(self, call_id: str, watcher: CallWatcher) -> None:
        """Wait no more; harmless for one that does not."""
        watchers = self._watchers.get(call_id)
        if watchers is not None and watcher in watchers:
            watchers.remove(watcher)
            if not watchers:
                del self._watchers[call_id]

    def take(self, reply: Reply) -> None:
        """Take in what the inbox got about a durable call."""
        watchers = self._watchers.get(reply.id)
        if watchers is None:
            return
        if reply.kind == PROGRESS:
            for watcher in list(watchers):
                watcher.on_progress(reply.payload)
        elif reply.kind in (NEWS, PART):
            for watcher in list(watchers):
                watcher.on_news()
        elif reply.out_of_line:
            spawn(self._fetch(reply))
        else:
            self._end(reply.id, reply)

    def _end(self, call_id: str, outcome: Outcome) -> None:
        for watcher in self._watchers.pop(call_id, ()):
            watcher.on_outcome(outcome)

    async def _fetch(self, reply: Reply) -> None:
        sender = self._link.sender
        if not sender.is_open:
            return  # `link_up` looks again
        try:
            result = await self._payloads.fetch(sender, result_id(reply.id))
            if result is None:
                raise FrameRejected("it is gone from Redis")
            self._end(reply.id, Reply(reply.id, ANYONE, reply.kind, result))
        except BrokerUnavailable:
            return
        except (QServeError, msgspec.DecodeError) as exc:
            self._end(reply.id, BrokerUnavailable(f"the result could not be fetched: {exc}"))

    def _look(self, call_id: str) -> None:
        sender = self._link.sender
        if sender.is_open:
            self.records.attach(sender, call_id, self._process, partial(self._looked, call_id))

    def _looked(self, call_id: str, answer: Answer) -> None:
        if isinstance(answer, Exception):
            if isinstance(answer, CommandRefused):
                self._end(call_id, BrokerUnavailable(f"Redis refused to tell of the call: {answer}"))
            return
        if answer is None:
            self._end(call_id, CallNotFound(f"there is no durable call {call_id!r} (any more)"))
            return
        _, _, _, result, progress, is_late = answer
        try:
            for frame in (progress, result):
                if frame is not None:
                    self.take(self.open(frame, call_id))
        except (FrameRejected, msgspec.DecodeError) as exc:
            self._end(call_id, exc if isinstance(exc, QServeError) else FrameRejected(str(exc)))
        if is_late == b"1":
            self.expire(call_id)

    def open(self, frame: bytes, call_id: str) -> Reply:
        """A reply to a durable call, verified.

        Raises:
            FrameRejected, msgspec.DecodeError: It is none, or one to another call.
        """
        reply = decode_reply(self._signer.open(frame))
        if reply.to != ANYONE or reply.id != call_id:
            raise FrameRejected("the result of another call")
        return reply

    async def describe(self, call_id: str, after_event: int = 0) -> CallRecord | None:
        """The record as it is now; None if there is none (any more).

        Raises:
            BrokerUnavailable: Redis cannot be asked.
        """
        sender = self._link.sender
        if not sender.is_open:
            raise BrokerUnavailable("Redis cannot be reached")
        record = await self.records.describe(sender, call_id, after_event)
        if record is None or not record.is_late:
            return record
        expired: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def noticed(_: Answer) -> None:
            if not expired.done():
                expired.set_result(None)

        self.expire(call_id, noticed)
        await expired
        return await self.records.describe(sender, call_id, after_event)

    async def parts(self, record: CallRecord, after: int) -> list[tuple[int, float, Part]]:
        """Some of the parts that a call has given after that number; PARTS_READ of them if there may be more.

        Raises:
            BrokerUnavailable: Redis cannot be asked.
            FrameRejected: One is not the call's.
        """
        sender = self._link.sender
        if not sender.is_open:
            raise BrokerUnavailable("Redis cannot be reached")
        found = await self.records.parts(sender, record, after, PARTS_READ) if record.has_parts else []
        return [(number, at, self._open_part(frame, record)) for number, at, frame in found]

    def _open_part(self, frame: bytes, record: CallRecord) -> Part:
        reply = self.open(frame, record.id)
        part = decode_part(reply.payload) if reply.kind == PART else None
        if part is None or part.attempt != record.attempts:
            raise FrameRejected("no part of this attempt")
        return part

    # Ending

    def cancel(self, call_id: str, on_answer: Callable[[Answer], None] | None = None) -> None:
        """Withdraw a call: waiting, it never runs; running, it is stopped if it is asynchronous, and not run again."""
        self._end_call(call_id, CANCELLED, CallCancelled("the call was cancelled"), on_answer)

    def expire(self, call_id: str, on_answer: Callable[[Answer], None] | None = None) -> None:
        """Let a call end whose time is over."""
        self._end_call(call_id, EXPIRED, GetTimeoutError("the call expired before it ran"), on_answer)

    def _end_call(
        self, call_id: str, state: str, error: QServeError, on_answer: Callable[[Answer], None] | None
    ) -> None:
        sender = self._link.sender
        if not sender.is_open:
            if on_answer is not None:
                on_answer(BrokerUnavailable("Redis cannot be reached"))
            return

        def check(answer: Answer) -> None:
            if isinstance(answer, list):
                replica, entry, _ = (part.decode() for part in answer)
                send_control(self._link.sender, self._keys, self._signer, replica, Control("cancel", entry), call_id)
            if on_answer is not None:
                on_answer(answer)

        info = ErrorInfo(error.code, type(error).__name__, type(error).__module__, str(error))
        reach("end-call")
        self.records.end(sender, call_id, state, durable_reply(self._signer, call_id, ERROR, encode(info)), check)
        reach("end-call-sent")

    # The client's life

    def link_up(self) -> None:
        """There is a connection (again): ask what is not known."""
        self.records.open(self._link.sender)
        self._collected = {}
        for submission in self._unconfirmed.values():
            self._collected.setdefault(submission.call.deployment, []).append(submission)
        self._flush()
        self._look_at = time.monotonic()
        self.tick()

    def link_down(self) -> None:
        """Redis has been away for too long: whoever submits is told."""
        self._collected = {}
        unconfirmed, self._unconfirmed = self._unconfirmed, {}
        for each in unconfirmed.values():
            text = f"Redis cannot be reached; whether it has taken call {each.call.id} is not known"
            each.on_admitted(BrokerUnavailable(text))

    def tick(self) -> None:
        """Once a second."""
        if self._watchers and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + _LOOK_AGAIN_S
            for call_id in list(self._watchers):
                if call_id not in self._unconfirmed:
                    self._look(call_id)

    def stop(self) -> None:
        """Nobody is told of anything any more; the calls go on."""
        self._stopped = True
        for confirmed in self._confirmed.values():
            confirmed.close()
        self.link_down()
        for call_id in list(self._watchers):
            self._end(call_id, CallCancelled("the client was stopped before the call ended; the call goes on"))


def _verdict(call: DurableCall, answer: Answer, place: int, full_queues: FullQueues) -> str | QServeError:
    name = call.deployment
    if (error := refusal_of_all(name, answer)) is not None:
        return error
    found = answer[1 + place]
    if found is None:
        return full_queues.refusal(name, answer[0])
    said, _, other = bytes(found).decode().partition(":")
    if said == "other":
        return IdempotencyConflict("another request was sent with this idempotency key before")
    return other or call.id
