"""One sender and one inbox per process: puts calls on queues and hands each reply to whoever waits for it."""

import asyncio
import contextlib
import itertools
import logging
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from functools import partial

import msgspec

from qserve.background import end, spawn
from qserve.broker.clock import SAMPLE_EVERY_S, RedisClock
from qserve.broker.connection import Answer, Connection, ignore_answer
from qserve.broker.inboxes import send_chunk, send_control
from qserve.broker.link import Link
from qserve.broker.payloads import Payloads, result_id
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.refusals import FullQueues
from qserve.calls.admission import Admission
from qserve.calls.pending import Outcome, PendingCall
from qserve.calls.receiver import Receiver
from qserve.calls.reconcile import Reconciler
from qserve.durable.submitting import DurableCalls
from qserve.errors import (
    BrokerUnavailable,
    CallCancelled,
    DeploymentUnavailable,
    FrameRejected,
    GetTimeoutError,
    Indeterminate,
    QServeError,
    StreamBroken,
)
from qserve.failpoints import reach
from qserve.settings import Settings
from qserve.wire.call_record import ANYONE
from qserve.wire.channel import ABORT, CREDIT, HELLO, Channel, Chunk, decode_chunk
from qserve.wire.messages import (
    CHUNK,
    CONTROL,
    ERROR,
    NO_META,
    Call,
    Control,
    Reply,
    Signer,
    decode_call,
    decode_control,
    encode,
    encode_call,
    with_meta,
)

logger = logging.getLogger(__name__)

_STOPPED = "the client was stopped before the call ended"


class Client:
    """Puts calls and receives their outcomes. Everything but `submit` and `withdraw` belongs to its loop's thread.

    Guarantees: each call gets exactly one outcome, at most once, no later than its deadline (plus a moment to ask why);
    a reply reaches only the call it was computed for, because inbox name and call ids are random per process.
    No write is ever repeated blindly.

    Attributes:
        tally: How many calls were accepted, `refused` by which error, and `ended` with which outcome.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.signer = Signer(settings.secrets)
        self.id = secrets.token_hex(16)
        self._payloads = Payloads(settings.keys, self.signer, settings.out_of_line_bytes)
        self._full_queues = FullQueues(settings.keys, lambda: self.writer)
        self.durable = DurableCalls(
            settings, self.signer, self._payloads, self.id, lambda: self.writer, self._full_queues
        )
        self.on_control: Callable[[str, Control], None] | None = None
        self.on_chunk: Callable[[str, Chunk], bool] | None = None
        self._keys = settings.keys
        self._receiver = Receiver(self._keys, self.id, self.signer, self._accept)
        self.tally: Counter[str] = Counter()
        self._clock = RedisClock()
        self._sample_at = 0.0
        self._numbers = itertools.count()
        self._pending: dict[str, PendingCall] = {}
        self._admission = Admission(self._keys, self._payloads, self._clock, self._full_queues, self._pending, self)
        self._submitted: deque[Callable[[], None]] = deque()
        self._wake_scheduled = False
        self._stopped = False
        self._link: Link
        self._keeper: asyncio.Task[None] | None = None

    # Life cycle

    async def start(self) -> None:
        """Connect and open the inbox.

        Raises:
            BrokerUnavailable, ConfigurationError: Redis cannot be used from here.
        """
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._link = Link(self.settings.redis_url, self._link_up, self._refuse_waiting)
        self._reconciler = Reconciler(self._keys, self._link, self._receiver, self)
        await self._link.start()
        self._keeper = spawn(self._receiver.keep_alive(self._tick))

    async def stop(self) -> None:
        """Close the inbox; calls still pending end as cancelled."""
        await end(self._keeper)
        self._stopped = True
        self._admission.stop()
        self._drain_submitted()
        self.durable.stop()
        for pending in list(self._pending.values()):
            self._finish(pending, CallCancelled(_STOPPED))
        if self._link.sender.is_open:
            self._receiver.discard(self._link.sender)
            self._link.sender.flush()
            with contextlib.suppress(BrokerUnavailable, TimeoutError):
                async with asyncio.timeout(1):
                    await self._link.sender.call("PING")
        await self._link.stop()

    def _tick(self) -> None:
        now = time.monotonic()
        self.durable.tick()
        self._reconciler.budget.note(self.tally["accepted"], now)
        if now >= self._sample_at and self._link.sender.is_open:
            self._sample_at = now + SAMPLE_EVERY_S
            spawn(self.sample_clock())

    async def sample_clock(self) -> None:
        """See whether Redis' clock has jumped."""
        sender = self._link.sender
        with contextlib.suppress(BrokerUnavailable, CommandRefused):
            if sender.is_open and await self._clock.sample(sender):
                spawn(self._reconciler.run())  # what was unread in the inbox may have expired

    @property
    def writer(self) -> Connection:
        """The connection for commands; a closed one while Redis is away."""
        return self._link.sender

    @property
    def pending(self) -> int:
        """How many calls wait for their outcome."""
        return len(self._pending)

    def is_own_thread(self) -> bool:
        """Whether the caller runs on this client's loop, and so must not block on it."""
        return threading.get_ident() == self._thread

    def descriptors(self) -> list[int]:
        """File descriptors of the open connections, for whoever must close them after a fork."""
        return self._link.descriptors()

    # Calling

    def prepare(
        self,
        deployment: str,
        *,
        kind: int,
        method: str,
        payload: bytes,
        timeout_s: float,
        safe: bool,
        on_outcome: Callable[[Outcome], None],
        meta: Mapping[str, str] = NO_META,
    ) -> PendingCall:
        """Make a call ready to be put. From any thread.

        Args:
            payload: Packed arguments or an encoded HttpRequest.
            timeout_s: Seconds from now to its deadline.
            on_outcome: Called exactly once, on the loop.
            meta: What hooks of this process say to those of the replica.
        """
        call_id = f"{self.id}{next(self._numbers):x}"
        sealed = self._payloads.seal(call_id, payload)
        if sealed is not None:
            payload = b""
        ttl_ms = int(timeout_s * 1000)
        call = Call(call_id, deployment, self.id, ttl_ms, kind, method, safe, payload, sealed is not None)
        if meta:
            call = with_meta(call, meta)
        return PendingCall(call_id, deployment, safe, self.signer.seal(encode(call)), sealed, timeout_s, on_outcome)

    def open_channel(self, pending: PendingCall) -> Channel:
        """Prepare a call for traffic beside its reply; before it is put. On the loop.

        Its deadline then holds until the first data comes back, and starts anew with every sign that the replica takes
        in what it is sent.
        """
        channel = pending.channel = Channel(self.id, partial(self._send_chunk, pending.id, pending))
        if pending.on_stream is not None:
            channel.on_data = partial(pending.on_stream, pending, channel)
        return channel

    def put(self, pending: PendingCall) -> None:
        """Put a prepared call, together with the others of this tick."""
        self._pending[pending.id] = pending
        if self._stopped:
            self._finish(pending, CallCancelled(_STOPPED))
            return
        pending.timer = self._loop.call_later(pending.deadline - time.monotonic(), self._expire, pending)
        self._admission.put(pending)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop this client lives on."""
        return self._loop

    def run_soon(self, action: Callable[[], None]) -> None:
        """Run something on the loop, from any thread; at once where this is the loop's own thread."""
        if threading.get_ident() == self._thread:
            action()
        else:
            self._from_thread(action)

    def submit(self, pending: PendingCall) -> None:
        """Put a prepared call from any thread."""
        if threading.get_ident() == self._thread:
            self.put(pending)
        else:
            self._from_thread(partial(self.put, pending))

    def withdraw(self, pending: PendingCall, *, inherited: bool = False) -> None:
        """Cancel a call, from any thread: queued, it never reaches a replica; running and safe, it is cancelled.

        Args:
            inherited: The call it was made by was cancelled: it is cancelled whether it is safe or not.
        """
        pending.inherited = inherited
        self.run_soon(partial(self.cancel, pending))

    def cancel(self, pending: PendingCall) -> None:
        """Like `withdraw`, on the loop."""
        if pending.channel is not None and pending.id in self._pending:
            pending.channel.abort("the caller left")
        if self._finish(pending, CallCancelled("the call was cancelled")):
            self.withdraw_entry(pending)

    def _from_thread(self, action: Callable[[], None]) -> None:
        # One wake-up serves all actions until the loop gets to them: a wake-up is a system call.
        self._submitted.append(action)
        if not self._wake_scheduled:
            self._wake_scheduled = True
            with contextlib.suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(self._drain_submitted)
        if self._stopped:  # nobody may come for it any more
            self._drain_submitted()

    def _drain_submitted(self) -> None:
        self._wake_scheduled = False
        submitted = self._submitted
        while submitted:
            try:
                action = submitted.popleft()
            except IndexError:  # a thread that finds the client stopped drains as well
                return
            action()

    # What admission asks for

    def refuse(self, call: PendingCall, error: QServeError) -> None:
        """End a call that Redis has not taken."""
        self._drop_payload(call)
        if call.id in self._pending:
            self.tally[f"refused {error.code}"] += 1
        self._finish(call, error)

    # Outcomes

    def _finish(self, pending: PendingCall, outcome: Outcome) -> bool:
        if self._pending.pop(pending.id, None) is None:
            return False
        if pending.timer is not None:
            pending.timer.cancel()
        if isinstance(outcome, Reply):
            self.tally["ended error" if outcome.kind == ERROR else "ended result"] += 1
        elif pending.entry is not None or pending.is_unanswered:
            self.tally[f"ended {outcome.code}"] += 1
        pending.end_channel(outcome)
        # Who waits often holds the call, too, and the collector comes seldom.
        on_outcome, pending.on_outcome, pending.on_stream = pending.on_outcome, ignore_answer, None
        try:
            on_outcome(outcome)
        except Exception:
            logger.exception("the receiver of call %s failed on its outcome", pending.id)
        return True

    def _expire(self, pending: PendingCall) -> None:
        if pending.id in self._pending:
            spawn(self._explain_timeout(pending))

    async def _explain_timeout(self, pending: PendingCall) -> None:
        outcome: QServeError = GetTimeoutError(
            f"the call to {pending.deployment!r} did not end before its deadline; it was withdrawn"
        )
        with contextlib.suppress(BrokerUnavailable, TimeoutError):
            if self._link.sender.is_open:
                async with asyncio.timeout(0.5):
                    meta = self._keys.meta(pending.deployment)
                    seen, now = await asyncio.gather(
                        self._link.sender.call("HGET", meta, "last_seen"), self._link.sender.call("TIME")
                    )
                age = int(now[0]) - int(seen or 0)
                if age > self.settings.dead_after_s:
                    since = f" since {time.strftime('%H:%M', time.localtime(int(seen)))}" if seen else ""
                    outcome = DeploymentUnavailable(f"no replica of {pending.deployment!r} has been seen{since}")
        # In this order: a replica that is told first would answer that the call was cancelled.
        if self._finish(pending, outcome):
            self.withdraw_entry(pending)

    def withdraw_entry(self, pending: PendingCall) -> None:
        """Take a call that has ended off its queue, or have it cancelled where it runs."""
        if pending.entry is None or not self._link.sender.is_open:
            return
        queue = self._admission.queue_of(pending)
        queue.cancel(self._link.sender, pending.entry, partial(self._withdrawn, pending))

    def _drop_payload(self, pending: PendingCall) -> None:
        if pending.payload is not None:
            self._payloads.drop(self._link.sender, pending.id)

    def _withdrawn(self, pending: PendingCall, answer: Answer) -> None:
        if answer == 1:
            self._drop_payload(pending)
        elif isinstance(answer, bytes) and pending.entry is not None:
            control = Control("cancel", pending.entry.decode(), pending.inherited)
            send_control(self._link.sender, self._keys, self.signer, answer.decode(), control, pending.id)

    def _accept(self, reply: Reply) -> None:
        if reply.to == self.id:
            self._dispatch(reply)
        elif reply.to == ANYONE:
            self.durable.take(reply)
        else:
            raise FrameRejected("a reply to another process")

    def _dispatch(self, reply: Reply) -> None:
        if reply.kind == CONTROL:
            if self.on_control is not None:
                self.on_control(reply.id, decode_control(reply.payload))
            return
        pending = self._pending.get(reply.id)
        if reply.kind == CHUNK:
            self._take_chunk(reply.id, pending, decode_chunk(reply.payload))
            return
        if pending is None:  # timed out or cancelled: the answer is late
            if reply.out_of_line:
                self._payloads.drop(self._link.sender, result_id(reply.id))
            return
        if reply.out_of_line:
            pending.entry = None  # answered: no more to be withdrawn or missed
            spawn(self._fetch(pending, reply))
        else:
            self._finish(pending, reply)

    def _take_chunk(self, call: str, pending: PendingCall | None, chunk: Chunk) -> None:
        if pending is not None and pending.channel is None and pending.on_stream is not None:
            self.open_channel(pending)
        if pending is not None and pending.channel is not None:
            reach("chunk-arrived")
            self._put_off(pending, chunk)
            pending.channel.feed(chunk)
        elif self.on_chunk is not None and self.on_chunk(call, chunk):
            return
        elif chunk.kind not in (ABORT, CREDIT):  # nobody listens any more
            self._send_chunk(call, None, chunk.sender, Chunk(self.id, ABORT, 0, b"the caller has left"))

    def _put_off(self, pending: PendingCall, chunk: Chunk) -> None:
        """A deadline holds until the first of a stream arrives; taking in what is sent buys time."""
        if pending.timer is None or (pending.is_strict and chunk.kind in (HELLO, CREDIT)):
            return
        pending.timer.cancel()
        pending.timer = None
        if chunk.kind in (HELLO, CREDIT):
            pending.timer = self._loop.call_later(pending.timeout_s, self._expire, pending)

    def _send_chunk(self, call: str, pending: PendingCall | None, to: str, chunk: Chunk) -> None:
        def check(answer: Answer) -> None:
            channel = pending.channel if pending is not None else None
            if channel is not None and channel.peer_has_left(answer):
                channel.close(StreamBroken("the replica is gone"))

        if self._link.sender.is_open:
            send_chunk(self._link.sender, self._keys, self.signer, to, call, chunk, check)
        elif pending is not None and pending.channel is not None:
            pending.channel.close(StreamBroken("Redis cannot be reached"))

    async def _fetch(self, pending: PendingCall, reply: Reply) -> None:
        outcome: Outcome = BrokerUnavailable("the result is gone from Redis")
        try:
            reach("result-announced")
            result = await self._payloads.take(self._link.sender, result_id(reply.id))
            if result is not None:
                outcome = Reply(reply.id, reply.to, reply.kind, result)
        except (BrokerUnavailable, FrameRejected, msgspec.DecodeError) as exc:
            outcome = BrokerUnavailable(f"the result could not be fetched: {exc}")
        self._finish(pending, outcome)

    # The link to Redis

    async def _link_up(self) -> None:
        await self._receiver.open(self._link)
        self._admission.flush()
        self.durable.link_up()
        spawn(self.sample_clock())
        if self._link.losses:
            spawn(self._reconciler.run())

    def _refuse_waiting(self) -> None:
        self.durable.link_down()
        for call in self._admission.give_back():
            self._finish(call, BrokerUnavailable("Redis cannot be reached; the call was not sent"))

    # What the reconciler asks for

    def unsettled(self) -> list[PendingCall]:
        """Calls that Redis has taken, or may have."""
        return [call for call in self._pending.values() if call.entry is not None or call.is_unanswered]

    def conclude(self, call: PendingCall, error: QServeError) -> None:
        """End a call that is lost."""
        if isinstance(error, Indeterminate):
            self._link.sender.send(ignore_answer, "HINCRBY", self._keys.counters, "indeterminate", 1)
        self._finish(call, error)

    def send_again(self, call: PendingCall) -> None:
        """Put a call once more, under another id: the first copy may still be somewhere, and is answered apart."""
        lost = decode_call(self.signer.open(call.frame))
        del self._pending[call.id]
        call.id = f"{self.id}{next(self._numbers):x}"
        call.entry, call.is_unanswered = None, False
        left_ms = int((call.deadline - time.monotonic()) * 1000)
        call.frame = self.signer.seal(encode_call(msgspec.structs.replace(lost, id=call.id, ttl_ms=max(0, left_ms))))
        self._pending[call.id] = call
        self.tally["sent again"] += 1
        self._admission.put(call)
