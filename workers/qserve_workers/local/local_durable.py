"""Durable calls in this process: recorded in its memory, run again after errors as in a replica, or given up on."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from qserve.background import end
from qserve.broker.connection import Answer
from qserve.broker.link import Link
from qserve.broker.payloads import Payloads
from qserve.broker.records import Records, durable_reply
from qserve.broker.refusals import FullQueues
from qserve.calls.durable_ref import CallStatus, status_of
from qserve.durable.by_id import CallsById
from qserve.durable.durable_client import DurableCalls
from qserve.durable.submitting import Submission, Submissions
from qserve.durable.watching import Watchers
from qserve.errors import (
    BackPressureError,
    BrokerUnavailable,
    CallCancelled,
    CallNotFound,
    DeploymentNotFound,
    GetTimeoutError,
)
from qserve.settings import Settings
from qserve.wire.call_record import (
    ANYONE,
    CANCELLED,
    DONE,
    EXPIRED,
    HAS_EXPIRED,
    NEWS,
    PROGRESS,
    QUEUED,
    RUNNING,
    SCHEDULED,
    CallRecord,
    DurableCall,
    DurableOptions,
    Part,
    decode_part,
)
from qserve.wire.codec import Codec
from qserve.wire.exceptions import text_of
from qserve.wire.messages import ERROR, VALUE, Reply, Signer, encode
from qserve_workers.calls.durable_parts import DurableCallInfo, RecordedParts
from qserve_workers.local.local_replica import LocalReplica
from qserve_workers.user.user_entry import what_was_raised


class LocalClock:
    """The time by which calls are due, which tests may let pass."""

    def __init__(self) -> None:
        self.passed_s = 0.0

    def now(self) -> float:
        """Unix time."""
        return time.time() + self.passed_s


@dataclass(eq=False)
class _Kept:
    """A durable call, its record, and what runs it."""

    call: DurableCall
    replica: LocalReplica
    submitted: float
    due: float | None
    expires: float | None
    state: str = SCHEDULED
    attempts: int = 0
    failures: int = 0
    started: float | None = None
    ended: float | None = None
    error: str = ""
    progress: bytes | None = None
    parts: list[tuple[int, float, Part]] = field(default_factory=list)
    result: Reply | None = None
    timer: asyncio.TimerHandle | None = None
    task: "asyncio.Task[None] | None" = None

    def record(self) -> CallRecord:
        """The record as it would be read from Redis."""
        call, position = self.call, 0 if self.state == QUEUED else None
        head = (call.id, self.state, call.deployment, call.kind, call.method, self.attempts)
        times = (self.submitted, self.started, self.ended, self.due)
        return CallRecord(
            *(*head, *times, position, self.error, self.progress),
            events=(),
            last_number=len(self.parts),
            has_parts=bool(self.parts),
            is_late=False,
        )


class LocalDurableCalls(DurableCalls):
    """Keeps and runs the durable calls of one process. Belongs to its event loop, but for the methods of tests.

    Args:
        replicas: The replica of each deployment.
    """

    confirms_at_once = True

    def __init__(
        self,
        settings: Settings,
        signer: Signer,
        codec: Codec,
        process: str,
        link: Link,
        *,
        replicas: Mapping[str, LocalReplica],
        clock: LocalClock,
    ) -> None:
        records, payloads = Records(settings.keys), Payloads(settings.keys, signer, settings.out_of_line_bytes)
        self._signer = signer
        self._codec = codec
        self._largest = settings.max_value_bytes
        self._replicas = replicas
        self._clock = clock
        self._kept: dict[str, _Kept] = {}
        self.by_id = _CallsHere(records, settings.keys, signer, link)
        self.by_id.kept, self.by_id.end_call = self._kept, self._cancel
        self.watchers = watchers = _WatchersHere(records, payloads, self.by_id, process, link)
        watchers.kept, watchers.open = self._kept, self.by_id.open
        self.submissions = _SubmissionsHere(
            *(settings, signer, records, payloads, process, link),
            full_queues=FullQueues(settings.keys, link),
            watchers=watchers,
            of_call=lambda _call_id: self.submissions,
        )
        self.submissions.take = self._take

    async def end_all(self) -> None:
        """Stop what runs, and run nothing more."""
        for kept in self._kept.values():
            if kept.timer is not None:
                kept.timer.cancel()
        await end(*(kept.task for kept in self._kept.values()))
        self.stop()

    # What tests may ask, from any thread

    def statuses(self) -> list[CallStatus]:
        """How each durable call is doing, in the order in which they were submitted."""
        return [status_of(kept.record()) for kept in list(self._kept.values())]

    def wake(
        self, run_soon: Callable[[Callable[[], None]], None], new: Iterable[tuple[DurableCall, DurableOptions]]
    ) -> None:
        """Begin what is due, after the clock has been moved, and submit calls that nobody waits for."""
        begun: Future[None] = Future()

        def begin() -> None:
            for kept in self._kept.values():
                if kept.timer is not None:
                    kept.timer.cancel()
                    self._wait(kept)
            for call, options in new:
                self._take(Submission(call, b"", None, options, lambda _: None))
            begun.set_result(None)

        run_soon(begin)
        begun.result()

    # From its submission to its end

    def _take(self, submission: Submission) -> None:
        call, options, now = submission.call, submission.options, self._clock.now()
        replica = self._replicas.get(call.deployment)
        if replica is None:
            submission.on_admitted(DeploymentNotFound(f"There is no deployment {call.deployment!r} here."))
            return
        if replica.is_full:
            submission.on_admitted(BackPressureError(f"the queue of {call.deployment!r} is full"))
            return
        expires = None if options.expires_s is None else now + options.expires_s
        kept = _Kept(call, replica, now, now + options.delay_s if options.delay_s else None, expires)
        self._kept[call.id] = kept
        replica.unanswered += 1
        submission.on_admitted(call.id)
        self._wait(kept)

    def _wait(self, kept: _Kept) -> None:
        if kept.due is None or kept.due <= self._clock.now():
            kept.state, kept.timer, kept.due = QUEUED, None, None
            context = kept.replica.context.copy()
            kept.task = asyncio.get_running_loop().create_task(self._run(kept), context=context)
        else:
            pause = kept.due - self._clock.now()
            kept.timer = asyncio.get_running_loop().call_later(pause, self._wait, kept)

    async def _run(self, kept: _Kept) -> None:
        while kept.ended is None:
            replica = self._replicas.get(kept.call.deployment)
            if replica is None:
                self._fail(kept, DeploymentNotFound(f"{kept.call.deployment!r} was deleted before the call ran"))
                return
            async with replica.slots:
                if kept.expires is not None and self._clock.now() > kept.expires:
                    error = GetTimeoutError(HAS_EXPIRED)
                    self._end(kept, EXPIRED, error)
                    return
                await self._attempt(kept, replica)

    async def _attempt(self, kept: _Kept, replica: LocalReplica) -> None:
        kept.attempts += 1
        kept.state, kept.started, kept.parts = RUNNING, self._clock.now(), []
        parts = RecordedParts(kept.attempts, self._codec, self._largest, self._recorder(kept))
        is_last = kept.failures >= kept.call.terms.retries
        info = DurableCallInfo(kept.call.id, kept.attempts, is_last=is_last, on_chunk=parts.value)
        info.report, info.lineage = self._reporter(kept), kept.call.id
        try:
            result = await replica.run(kept.call, info)
        except asyncio.CancelledError:
            self._cancel(kept)
            raise
        except BaseException as exc:  # packing a result runs user code, too
            self._fail(kept, what_was_raised(exc))
        else:
            self._settle(kept, DONE, VALUE, result)

    def _fail(self, kept: _Kept, error: BaseException) -> None:
        kept.failures += 1
        kept.error = f"{type(error).__name__}: {text_of(error)}"
        state = kept.call.terms.state_after(error, kept.failures)
        if state == SCHEDULED:
            kept.state = QUEUED  # at once: a test need not wait for the pause
        else:
            self._end(kept, state, error)

    def _cancel(self, kept: _Kept) -> None:
        self._end(kept, CANCELLED, CallCancelled("the call was cancelled"))
        if kept.timer is not None:
            kept.timer.cancel()
        if kept.task is not None:
            kept.task.cancel()

    def _end(self, kept: _Kept, state: str, error: BaseException) -> None:
        self._settle(kept, state, ERROR, encode(self._codec.pack_error(error)))

    def _settle(self, kept: _Kept, state: str, kind: int, payload: bytes) -> None:
        if kept.ended is None:
            kept.state, kept.ended = state, self._clock.now()
            kept.replica.unanswered -= 1
            kept.result = Reply(kept.call.id, ANYONE, kind, payload)
            self.watchers.take(kept.result)

    def _reporter(self, kept: _Kept) -> Callable[[object], None]:
        loop = asyncio.get_running_loop()

        def report(value: object) -> None:
            packed = self._codec.pack(value, "the progress")
            loop.call_soon_threadsafe(note, durable_reply(self._signer, kept.call.id, PROGRESS, packed))

        def note(frame: bytes) -> None:
            kept.progress = frame
            self.watchers.take(self.by_id.open(frame, kept.call.id))

        return report

    def _recorder(self, kept: _Kept) -> Callable[[int, bytes], Awaitable[None]]:
        async def record(index: int, part: bytes) -> None:
            kept.parts.append((index, self._clock.now(), decode_part(part)))
            self.watchers.take(Reply(kept.call.id, ANYONE, NEWS, b""))

        return record


class _CallsHere(CallsById):
    kept: Mapping[str, _Kept]
    end_call: Callable[[_Kept], None]

    async def describe(self, call_id: str, after_event: int = 0) -> CallRecord | None:
        found = self.kept.get(call_id)
        return None if found is None else found.record()

    async def parts(self, record: CallRecord, after: int) -> list[tuple[int, float, Part]]:
        return [each for each in self.kept[record.id].parts if each[0] > after]

    def cancel(self, call_id: str, on_answer: Callable[[Answer], None] | None = None) -> None:
        found = self.kept.get(call_id)
        answer = b"unknown" if found is None else b"done" if found.ended is None else b"ended"
        if found is not None and found.ended is None:
            self.end_call(found)
        if on_answer is not None:
            on_answer(answer)


class _WatchersHere(Watchers):
    kept: Mapping[str, _Kept]
    open: Callable[[bytes, str], Reply]

    def look(self, call_id: str) -> None:
        found = self.kept.get(call_id)
        if found is None:
            self.settle(call_id, CallNotFound(f"there is no durable call {call_id!r} in this process"))
            return
        if found.progress is not None:
            self.take(self.open(found.progress, call_id))
        if found.result is not None:
            self.take(found.result)


class _SubmissionsHere(Submissions):
    take: Callable[[Submission], None]

    def submit(self, submission: Submission) -> None:
        if self._stopped:
            submission.on_admitted(BrokerUnavailable("the call was not submitted: nothing runs here any more"))
        else:
            self.take(submission)
