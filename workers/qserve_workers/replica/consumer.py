"""Takes calls from a deployment's queue, runs them, and answers each exactly once."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterable
from functools import partial

from qserve.background import end, spawn
from qserve.broker.clock import SAMPLE_EVERY_S, RedisClock
from qserve.broker.connection import Answer, ignore_answer
from qserve.broker.link import BLOCK_MS, CHECK_EVERY_S, Link
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.replica_queue import Entry, ReplicaQueue
from qserve.broker.stream_ids import order
from qserve.context import current_call
from qserve.errors import (
    BrokerUnavailable,
    CallCancelled,
    FrameRejected,
    Indeterminate,
    PoisonCall,
    QServeError,
    ReplicaDied,
    StreamBroken,
)
from qserve.failpoints import reach
from qserve.settings import Settings
from qserve.wire.call_record import DurableCall
from qserve.wire.codec import Codec
from qserve.wire.messages import (
    ERROR,
    HTTP,
    STREAM,
    Call,
    Signer,
    encode,
)
from qserve.wire.spec import DeploymentSpec
from qserve_workers.replica.absence import Absence
from qserve_workers.replica.answers import Answers
from qserve_workers.replica.arrivals import Arrivals
from qserve_workers.replica.durable_calls import DurableRuns
from qserve_workers.replica.running import Code, Conversations, Runner, RunningCall
from qserve_workers.replica.user_entry import what_was_raised

logger = logging.getLogger(__name__)

_UNWANTED_KEPT = 8192
_SUSPECTS_KEPT = 16
_LAST_WORD_S = 2.0
_NEXT_TRY_S = 0.2
_FORGOTTEN = "Redis was restarted or replaced and may have lost that the call ran: it does not run again"
_UNTOLD = "the replica was stopped before the call ended; it may have run in part, so it is not run again"


class Consumer:
    """One replica's share of its deployment's calls. Belongs to the replica's event loop.

    A call taken before its replica died comes here a second time only if it is safe to run again. Then it runs apart
    from new calls, with others of its kind, the last time alone, and after `max_deliveries` goes to the dead letters.
    """

    def __init__(self, settings: Settings, signer: Signer, codec: Codec, spec: DeploymentSpec, replica: str) -> None:
        self.spec = spec
        self.handled = 0
        self.run_times_ms: deque[float] = deque(maxlen=512)
        self.queue = ReplicaQueue(settings.keys, spec.name, replica)
        self._replica = replica
        self._settings = settings
        self._keys = settings.keys
        self._signer = signer
        self._codec = codec
        self._clock = RedisClock()
        self._idle = asyncio.Event()
        self._link = Link(settings.redis_url, self._link_up)
        self._answers = Answers(settings, signer, self.queue, self._link)
        self.conversations = Conversations(
            settings,
            signer,
            self._link,
            replica,
            on_streaming=self._idle.set,
            on_deserted=lambda running: self.cancel(running.entry.id),
        )
        self._runner = Runner(settings, signer, codec, link=self._link, clock=self._clock, talks=self.conversations)
        self.durable = DurableRuns(settings, signer, codec, replica, self._link, self)
        self._running: dict[bytes, RunningCall] = {}
        self._on_thread = 0
        self._suspects: deque[Entry] = deque()
        self._on_trial: set[bytes] = set()
        self._arrivals = Arrivals(settings, signer, spec.name, self._link)
        self.absence = Absence(settings.dead_after_s, self._is_mine, self._begin_all)
        self._unwanted: dict[bytes, None] = {}
        self._before: tuple[int, int] | None = None
        """Order of the last entry of before a restart of the server, where unsafe calls from then must not run."""
        self._accepting = False
        self._reading = False
        self._waiter_id = 0
        self._read_ended = asyncio.Event()
        self._clockwork: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    # Life cycle

    async def connect(self) -> None:
        """Open the queue without taking anything from it."""
        await self._link.start()
        await self.queue.introduce(self._link.sender)
        self._clockwork = spawn(self._sample_clock())
        self._watch = spawn(self.conversations.watch_callers())

    def start(self, code: Code) -> None:
        """Begin, or go on, to take calls."""
        self._runner.code = code
        self._accepting = True
        self._read_more()

    async def pause(self) -> None:
        """Take no more calls; returns when none is being read any more."""
        self._accepting = False
        while self._reading and self._link.sender.is_open:
            self._read_ended.clear()
            self._end_read()
            await self._read_ended.wait()

    async def finish(self, timeout_s: float, *, streams: bool = True) -> bool:
        """Wait until every call started is answered; False if some are not within `timeout_s`.

        Args:
            streams: Wait for those that stream, too, which may take as long as they please.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while self._on_trial or any(streams or not call.streams for call in self._running.values()):
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def finish_queue(self, timeout_s: float) -> bool:
        """Answer what is queued as well, taking calls until none is left."""
        try:
            async with asyncio.timeout(timeout_s):
                while await self._queue_length():  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> bool:
        """Answer what never ended, and disconnect; False if an answer may not have arrived."""
        for running in list(self._running.values()):
            self._abandon(running)
        self._answers.insist()
        self._answers.flush()
        await end(self._clockwork, self._watch)
        with contextlib.suppress(QServeError, TimeoutError):
            async with asyncio.timeout(_LAST_WORD_S):
                await self._link.sender.call("PING")  # the answers before it have arrived
        await self._link.stop()
        return not (self._answers.unconfirmed or self.durable.unconfirmed)

    @property
    def link(self) -> Link:
        """The connections, for whoever takes over calls on behalf of this replica."""
        return self._link

    def count(self, metric: str, by: int = 1) -> None:
        """Raise one of the namespace's counters."""
        self._answers.count(metric, by)

    @property
    def running(self) -> int:
        """How many calls are taken and not answered."""
        return len(self._running)

    @property
    def room_to_rerun(self) -> int:
        """How many calls of dead replicas this one can take now, to run them again one by one."""
        return max(0, _SUSPECTS_KEPT - len(self._suspects)) if self._accepting else 0

    @property
    def entries(self) -> list[bytes]:
        """Entry ids of the calls that are taken and not answered."""
        return [*self._running, *(entry.id for entry in self._suspects)]

    async def _link_up(self) -> None:
        sender, waiter = self._link.sender, self._link.waiter
        await self.queue.open(sender)
        self._waiter_id = await waiter.call("CLIENT", "ID")
        await self._clock.sample(sender)
        if self._settings.strict:
            self._before = order(await self.queue.last_from_before(sender) or b"0-0")
        if self._link.losses:
            # A batch delivered into the dying connection is ours, but never arrived.
            known = {*self._running, *(entry.id for entry in self._suspects), *self.durable.settled}
            ours = [
                entry
                for entry in await self.queue.history(sender)
                if entry.id not in known and entry.id not in self._on_trial and not self._answers.has(entry.id)
            ]
            if self.absence.noticed():
                self.absence.hold(ours)
            else:
                self._begin_all(ours)
        self._answers.resend()
        self.durable.resend()
        self._read_more()

    async def _sample_clock(self) -> None:
        sample_at = time.monotonic() + SAMPLE_EVERY_S
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            self._link.check()
            if self._link.sender.is_open and time.monotonic() >= sample_at:
                sample_at = time.monotonic() + SAMPLE_EVERY_S
                try:
                    await self._clock.sample(self._link.sender)
                except QServeError as exc:
                    logger.debug("could not read Redis' clock: %s", exc)

    async def _queue_length(self) -> int:
        if not self._link.sender.is_open:
            return 1
        try:
            length: int = await self._link.sender.call("XLEN", self._keys.calls(self.spec.name))
        except BrokerUnavailable:
            return 1
        return length

    # Taking calls

    def _read_more(self) -> None:
        waiter = self._link.waiter
        if self._reading or not waiter.is_open or not self._accepting or self._on_trial:
            return
        if self.absence.noticed():
            return
        if self._suspects:
            if not self._running:
                self._try_suspects()
            return
        room = self._room()
        if room > 0:
            self._reading = True
            self.queue.read(waiter, self._arrived, most=room, block_ms=BLOCK_MS)

    def _room(self) -> int:
        running = len(self._running)
        free = self.spec.max_concurrent_queries - running
        if self._runner.code.only_sync:
            return min(free, self.spec.max_threads - running)
        if self._on_thread > self.spec.max_threads:
            return 0  # a call waits for the thread: leave the next one to a replica that is free
        return min(free, 1 + running)  # a burst spreads over the replicas instead of filling the first

    def _arrived(self, answer: Answer) -> None:
        self._reading = False
        self._read_ended.set()
        if isinstance(answer, Exception):
            if isinstance(answer, CommandRefused):
                self._read_failed(answer)
            return
        if answer:
            reach("taken")
        if self.absence.noticed():
            self.absence.hold(self.queue.entries(answer))
        else:
            self._begin_all(self.queue.entries(answer))

    def _begin_all(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if entry.id not in self._running:  # else the server has forgotten that it gave it to us, and did so again
                self._begin(entry)
        self._read_more()

    async def _is_mine(self, entry: Entry) -> bool:
        return await self.queue.note_start(self._link.sender, entry.id)

    def _read_failed(self, error: Exception) -> None:
        # NOGROUP: the stream is gone. After a deletion that is as it should be; else the link makes it again.
        if self._accepting:
            logger.warning("reading the queue of %s failed: %s", self.spec.name, error)
            asyncio.get_running_loop().call_later(_NEXT_TRY_S, self._link.lose)

    def _end_read(self) -> None:
        # On the server, where an entry is either delivered whole or not at all; a read cancelled here would lose some.
        if self._reading and self._link.sender.is_open:
            self._link.sender.send_now(ignore_answer, "CLIENT", "UNBLOCK", self._waiter_id)

    def take_over(self, entries: list[Entry]) -> None:
        """Decide on entries taken from a replica that is gone."""
        for entry in entries:
            if entry.id not in self._running:
                self._begin(entry)
        if self._suspects:
            self._end_read()
        self._read_more()

    def _begin(self, entry: Entry) -> None:
        try:
            call, again = self._arrivals.open(entry)
        except FrameRejected as exc:
            self._reject(entry, exc)
            return
        if entry.id in self._unwanted and not entry.durable:
            self._answers.add(entry.id, call, ERROR, self._pack_error(CallCancelled("the caller left first")))
        elif entry.deliveries > 1:
            self._begin_again(entry, call)
        elif (again or self._is_from_before(entry)) and not (call.safe or self.spec.idempotent):
            # The server has forgotten that it gave this call out, to us or, where it is strict about it, to anybody.
            self.count("indeterminate")
            self._answers.add(entry.id, call, ERROR, self._pack_error(Indeterminate(_FORGOTTEN)))
        else:
            self._start(entry, call)

    def _is_from_before(self, entry: Entry) -> bool:
        return self._before is not None and order(entry.id) <= self._before

    def _reject(self, entry: Entry, error: FrameRejected) -> None:
        if entry.durable:
            self._answers.note_rejected(error)
            spawn(self.durable.reject(entry, self.spec.name, error))
        else:
            spawn(self._answers.reject(entry, error))

    def _start(self, entry: Entry, call: Call) -> None:
        running = RunningCall(entry, call, self._runner.code.needs_thread(call.method))
        self._running[entry.id] = running
        self._on_thread += running.needs_thread
        if isinstance(call, DurableCall):
            running.task = asyncio.create_task(self.durable.run(running, call, self._runner.code))
        elif call.safe or self.spec.idempotent or not self._arrivals.claims:
            running.task = asyncio.create_task(self._run(running))
        else:
            self._arrivals.claim(call, partial(self._claimed, running))

    def _claimed(self, running: RunningCall, first: bool | BrokerUnavailable) -> None:
        """Run a call that nobody has run; the answer to one that somebody has is theirs to give."""
        entry = running.entry
        if first is True and entry.id in self._running:
            running.unwanted = running.unwanted or entry.id in self._unwanted
            running.task = asyncio.create_task(self._run(running))
            return
        if self._forget(running):
            if isinstance(first, BrokerUnavailable):
                self._answers.add(entry.id, running.call, ERROR, self._pack_error(first))
            else:
                self._reject(entry, FrameRejected("a call that was run before"))
        self._read_more()

    def _begin_again(self, entry: Entry, call: Call) -> None:
        """Settle a call whose replica died, or keep it for a trial: it may have been what killed it."""
        if not (call.safe or self.spec.idempotent):
            text = f"a replica of {self.spec.name!r} died while it had the call; it may have run: it does not run again"
            self._answers.add(entry.id, call, ERROR, self._pack_error(ReplicaDied(text)))
        elif entry.deliveries > self._settings.max_deliveries:
            retries = self._settings.max_deliveries - 1
            text = f"Task failed with {retries} retries: every replica of {self.spec.name!r} that had the call died"
            if isinstance(call, DurableCall):
                self.durable.bury(entry, call, text, PoisonCall(text))
            else:
                spawn(self._answers.bury(entry, call, text, self._pack_error(PoisonCall(text))))
        else:
            self._suspects.append(entry)

    def _try_suspects(self) -> None:
        # Apart from new calls, which would be harmed; together, since most of them are innocent and one after the other
        # they would keep callers waiting for the sum of their times. Nobody has his last chance in such company.
        last = self._settings.max_deliveries
        most = self.spec.max_threads if self._runner.code.only_sync else self.spec.max_concurrent_queries
        chosen = [entry for entry in self._suspects if entry.deliveries < last][:most] or [self._suspects[0]]
        self._on_trial = {entry.id for entry in chosen}
        self._suspects = deque(entry for entry in self._suspects if entry.id not in self._on_trial)
        for entry in chosen:
            spawn(self._try(entry))

    async def _try(self, entry: Entry) -> None:
        """Run a call again, once it is noted that it was started: only what was is blamed if this replica dies, too."""
        try:
            reach("note-start")
            is_mine = await self.queue.note_start(self._link.sender, entry.id)
        except (BrokerUnavailable, CommandRefused) as exc:
            logger.warning("could not note that a call runs again: %s", exc)
            self._suspects.appendleft(entry)
            is_mine = False
            await asyncio.sleep(_NEXT_TRY_S)
        if is_mine:
            reach("start-noted")
            call, _ = self._arrivals.open(entry)
            self._start(entry, call)
            return
        self._on_trial.discard(entry.id)
        self._idle.set()
        self._read_more()

    # Running a call: all of its outcomes

    async def _run(self, running: RunningCall) -> None:
        entry, call = running.entry, running.call
        current_call.set(running.info)
        running.began = True
        try:
            if running.unwanted:
                raise CallCancelled("the caller left before the call ran")
            reach("run")
            kind, result = await self._runner.run(running)
        except asyncio.CancelledError:
            if entry.id not in self._running:
                return  # abandoned or taken over: somebody else answers
            kind, result = ERROR, self._pack_error(CallCancelled("the call was cancelled while it ran"))
        except FrameRejected as exc:
            if self._forget(running):
                spawn(self._answers.reject(entry, exc, call, self._pack_error(exc)))
            self._read_more()
            return
        except BaseException as exc:  # packing a result runs user code, too
            error = what_was_raised(exc)
            if not isinstance(error, Exception) or (call.kind == HTTP and not isinstance(error, QServeError)):
                logger.error(
                    "Exception in deployment %r, request %s", self.spec.name, running.info.request_id, exc_info=error
                )
            kind, result = ERROR, self._pack_error(error)
        reach("ran")
        if self._forget(running):
            self.handled += 1
            self.run_times_ms.append((time.monotonic() - running.started_at) * 1000)
            self._answers.add(entry.id, call, kind, result)
        self._read_more()

    async def fetch(self, call: Call) -> bytes:
        """The payload of a call that travelled out of line."""
        return await self._runner.fetch(call)

    def is_running(self, entry: bytes) -> bool:
        """Whether a call is still this replica's to answer."""
        return entry in self._running

    def note_rejected(self, error: Exception) -> None:
        """Count what is no message of ours."""
        self._answers.note_rejected(error)

    def release(self, entry: bytes, *, counts: bool) -> None:
        """Let go of a durable call; `counts`: it ran."""
        running = self._running[entry]
        self._forget(running)
        if counts:
            self.handled += 1
            self.run_times_ms.append((time.monotonic() - running.started_at) * 1000)
        self._read_more()

    def _forget(self, running: RunningCall) -> bool:
        self.conversations.close(running)
        if self._running.pop(running.entry.id, None) is None:
            return False
        self._on_thread -= running.needs_thread
        self._on_trial.discard(running.entry.id)
        self._idle.set()
        return True

    def _pack_error(self, error: BaseException) -> bytes:
        return encode(self._codec.pack_error(error))

    def cancel(self, entry: bytes, *, inherited: bool = False) -> None:
        """The caller of a call has left: code that listens for that hears of it.

        A call that is safe to leave half done is cancelled, with the calls it has made, unless it is on a thread; one
        that only streams is, too. One that has not arrived yet will not start.

        Args:
            inherited: The call that made it was cancelled.
        """
        running = self._running.get(entry)
        if running is None or running.task is None:
            self._unwanted[entry] = None
            if len(self._unwanted) > _UNWANTED_KEPT:
                del self._unwanted[next(iter(self._unwanted))]
            return
        running.unwanted = True
        if running.channel is not None:
            running.channel.close(StreamBroken("the caller left"))
        if inherited or running.call.safe or running.call.kind == STREAM or self.spec.idempotent:
            running.info.cancel_nested()
            if running.began and not running.needs_thread:  # a task cancelled before its first step never takes it
                running.task.cancel()

    def lost(self, entries: list[bytes]) -> None:
        """Stop calls that others have taken over while this replica was thought dead.

        One that is on a thread goes on and keeps its place there; its late answer will be dropped.
        """
        for entry in entries:
            running = self._running.get(entry)
            if running is not None and not running.needs_thread:
                self._drop(running)
        self._suspects = deque(entry for entry in self._suspects if entry.id not in entries)
        self._read_more()

    def _abandon(self, running: RunningCall) -> None:
        """Give up a call that outlived the shutdown: a safe one is left for others, an unsafe one is answered."""
        call = running.call
        self._drop(running)
        if not (call.safe or self.spec.idempotent):
            self._answers.add(running.entry.id, call, ERROR, self._pack_error(ReplicaDied(_UNTOLD)))

    def _drop(self, running: RunningCall) -> None:
        if self._forget(running) and running.task is not None:
            running.task.cancel()
