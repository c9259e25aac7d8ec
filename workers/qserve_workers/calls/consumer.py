"""Takes calls from a deployment's queue, lets them run, and sees to it that each is answered exactly once."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable

from qserve.background import end, spawn
from qserve.broker.connection import Answer
from qserve.broker.large.lending import Lending
from qserve.broker.link import Link
from qserve.broker.redis_errors import ASK_AGAIN_S, CommandRefused, is_moving
from qserve.broker.replica_queue import Entry, ReplicaQueue
from qserve.broker.server.clock import SAMPLE_EVERY_S, RedisClock
from qserve.broker.stream_ids import order
from qserve.errors import BrokerUnavailable, QServeError
from qserve.failpoints import reach
from qserve.hooks import HookChain, ReplicaHook
from qserve.settings import Settings
from qserve.wire.codec import Codec
from qserve.wire.messages import Signer
from qserve.wire.spec import DeploymentSpec
from qserve_workers.calls.absence import Absence
from qserve_workers.calls.answers import Answers
from qserve_workers.calls.arrivals import Arrivals
from qserve_workers.calls.call_counts import CallCounts
from qserve_workers.calls.durable_calls import DurableRuns
from qserve_workers.calls.model_affinity import ModelAffinity
from qserve_workers.calls.mover import Mover
from qserve_workers.calls.ordinary_calls import OrdinaryRuns
from qserve_workers.calls.queue_reading import QueueReading
from qserve_workers.calls.running import Conversations, RunningCall
from qserve_workers.calls.self_calls import SelfCalls
from qserve_workers.calls.slots import Slots
from qserve_workers.calls.suspects import Suspects
from qserve_workers.calls.triage import Triage
from qserve_workers.calls.withdrawn_calls import WithdrawnCalls
from qserve_workers.user.user_code import UserCode

logger = logging.getLogger(__name__)

_LAST_WORD_S = 2.0
_NEXT_TRY_S = 0.2
_LOOK_EVERY_S = 0.02


async def _always() -> bool:
    return True


class Consumer:
    """One replica's share of its deployment's calls. Belongs to the replica's event loop.

    Args:
        replica: Id of the replica.
        lending: Its large values.
        hooks: Run around every call.
        may_go_on: Whether a replica that stood still for long may go on to take calls.

    Attributes:
        link: The connections of everything that has to do with calls.
        mover: Puts calls on the queue that are due.
        slots: The calls that are taken and not answered.
        takeover_wanted: Set when this replica has room for calls of dead ones.
        on_first_call: Called when a call comes while `link` rests.
    """

    def __init__(
        self,
        settings: Settings,
        signer: Signer,
        codec: Codec,
        spec: DeploymentSpec,
        replica: str,
        lending: Lending,
        *,
        hooks: HookChain[ReplicaHook] | None = None,
        may_go_on: Callable[[], Awaitable[bool]] = _always,
    ) -> None:
        self._strict = settings.strict
        self._clock = RedisClock()
        self._changed = asyncio.Event()
        self._code: UserCode | None = None
        """What runs the calls; None until the first may be taken."""
        self._is_accepting = self._dead_wait = False
        self.takeover_wanted = asyncio.Event()
        self.on_first_call: Callable[[], None] = lambda: None
        self._tasks: list[asyncio.Task[None]] = []
        self.link = link = Link(settings.keys.address(settings.redis_url), self._link_up)
        self.queue = queue = ReplicaQueue(settings.keys, spec.name, replica)
        self._answers = Answers(settings, signer, queue, link, lending, self._read_more)
        self._reading = QueueReading(queue, link, self._answers, self._arrived)
        self.mover = Mover(settings, spec.name, replica, link)
        self._conversations = conversations = Conversations(
            *(settings, signer, link, replica),
            on_streaming=self._changed.set,
            on_deserted=lambda running: self.withdrawn.withdraw(running.entry.id),
        )
        self.take_chunk = conversations.take_chunk
        counts = CallCounts(settings.keys, spec.name, settings.slow_call_s)
        self.slots = slots = Slots(spec, conversations, self._changed, self._freed, counts)
        self.withdrawn = WithdrawnCalls(slots)
        self._suspects = Suspects(settings.max_deliveries)
        moving = (self.withdrawn, self._suspects.starting, self._go_on)
        self.affinity = ModelAffinity(settings, signer, queue, link, *moving)
        common = (link, slots, self._answers)
        self._ordinary = OrdinaryRuns(
            *(settings, signer, codec, *common), clock=self._clock, conversations=conversations, hooks=hooks
        )
        durable = (settings, signer, codec, replica, *common)
        self._durable = DurableRuns(*durable, clock=self._clock, hooks=hooks, on_retry=self.mover.look_in)
        self._triage = Triage(
            *(settings, link, slots, Arrivals(settings, signer, spec.name, link), self._answers),
            *(self._ordinary, self._durable, self._suspects, self.withdrawn, self.affinity),
        )
        self._self_calls = SelfCalls(settings, signer, queue, link, slots, self._ordinary)
        self.absence = Absence(settings.dead_after_s, self._note_start, self._begin_all, may_go_on)

    # Life cycle

    async def connect(self) -> None:
        """Open the queue without taking anything from it."""
        await self.link.start()
        await self.queue.introduce(self.link.sender)
        self._tasks = [spawn(self._watch_link()), spawn(self._conversations.watch_callers())]

    def start(self, code: UserCode) -> None:
        """Begin, or go on, to take calls."""
        self._code = code
        self._is_accepting = True
        self.mover.start()
        self.affinity.accept()
        self._read_more()

    async def pause(self) -> None:
        """Take no more calls; returns when none is being read any more."""
        self._is_accepting = False
        self.affinity.decline()
        await self._reading.end()

    async def finish(self, timeout_s: float, *, streams: bool = True) -> bool:
        """Wait until every call started is answered; False if some are not within `timeout_s`.

        Args:
            streams: Wait for those that stream, too, which may take as long as they please.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while self._suspects.starting or any(streams or not call.streams for call in self.slots.calls):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def finish_queue(self, timeout_s: float) -> bool:
        """Answer what is queued as well, taking calls until none is left."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while True:
                    with contextlib.suppress(BrokerUnavailable):
                        if not await self.queue.length(self.link.sender):
                            return True
                    await asyncio.sleep(_LOOK_EVERY_S)
        return False

    async def stop(self) -> bool:
        """Answer what never ended, and disconnect; False if an answer may not have arrived."""
        await self.mover.stop()
        for running in self.slots.calls:
            self._ordinary.abandon(running)
        self._answers.insist()
        self._answers.flush()
        await end(*self._tasks)
        with contextlib.suppress(QServeError, TimeoutError):
            async with asyncio.timeout(_LAST_WORD_S):
                await self.link.sender.settle_all()
        await self._answers.lending.drained()
        await self.link.stop()
        return not (self._answers.unconfirmed or self._durable.unconfirmed)

    # What others have to know

    @property
    def entries(self) -> list[bytes]:
        """Entry ids of the calls that are taken and not answered."""
        return [*self.slots.entries, *self._suspects.entries, *self.affinity.waiting]

    @property
    def room_to_rerun(self) -> int:
        """How many calls of dead replicas this one can take now, to run them again."""
        code, suspects = self._code, self._suspects
        if code is None or not self._is_accepting or suspects.want_to_be_alone:
            return 0
        return max(0, self.slots.free(code) - len(suspects) - len(suspects.starting))

    def mind_the_dead(self, are_waiting: bool) -> None:
        """Whether calls of dead replicas wait for somebody who has room. Then this one looks for them before it reads
        new ones, whenever it has room."""
        self._dead_wait = are_waiting
        self._read_more()

    def take_over(self, entries: list[Entry]) -> None:
        """Decide on entries taken from a replica that is gone."""
        self._begin_all(entries)
        if self._suspects:
            self._reading.cut_short()

    def look_for_self_calls(self, *, is_only: bool) -> None:
        """End a call that can never start, if there is one; see `SelfCalls.look`."""
        self._self_calls.look(self._code, is_only=is_only)

    def lost(self, entries: list[bytes]) -> None:
        """Stop calls that others have taken over while this replica was thought dead.

        One that is on a thread goes on and keeps its place there; its late answer will be dropped.
        """
        for entry in entries:
            running = self.slots.get(entry)
            if running is not None and not running.needs_thread:
                self.slots.drop(running)
        self._suspects.forget(entries)
        self.affinity.forget(entries)
        self._read_more()

    # Taking calls

    async def _link_up(self) -> None:
        sender = self.link.sender
        await self.queue.open(sender)
        await self._reading.link_up()
        await self._clock.sample(sender)
        if self._strict:
            self._triage.before = order(await self.queue.last_from_before(sender) or b"0-0")
        if self.link.losses:
            # A batch delivered into the dying connection is ours, but never arrived.
            known = {*self.entries, *self._suspects.starting, *self._durable.settled}
            history = await self.queue.history(sender)
            self._take([entry for entry in history if entry.id not in known and not self._answers.has(entry.id)])
        self._answers.resend()
        self._durable.resend()
        self.affinity.tell_all()
        self._read_more()

    async def _watch_link(self) -> None:
        sample_at = time.monotonic() + SAMPLE_EVERY_S
        while True:
            await asyncio.sleep(self.link.pause_s)
            self.link.check()
            if self.link.sender.is_open and time.monotonic() >= sample_at:
                sample_at = time.monotonic() + SAMPLE_EVERY_S
                spawn(self._sample_clock())  # not awaited: only the next checks notice that no answer comes

    async def _sample_clock(self) -> None:
        try:
            await self._clock.sample(self.link.sender)
        except QServeError as exc:
            logger.debug("could not read Redis' clock: %s", exc)

    def _read_more(self) -> None:
        code, suspects = self._code, self._suspects
        if self.affinity.waiting and code is not None:
            self._start_handed_over(code)
        if code is None or not self._is_accepting or self._reading.is_under_way or suspects.alone:
            return
        if not self.link.waiter.is_open or self.absence.noticed():
            return
        if suspects:
            room = self.slots.free(code) - len(suspects.starting)
            for entry in suspects.choose(room, is_idle=not self.slots):
                spawn(self._try(entry, code))
            if suspects.want_to_be_alone:
                return
        room = self.slots.room(code, self._reading.begun) - len(suspects.starting)
        if room <= 0:
            return
        if self._dead_wait:
            self.takeover_wanted.set()
        else:
            self._reading.read(room)

    def _start_handed_over(self, code: UserCode) -> None:
        """Start calls that others have handed over, before new ones are read."""
        if not self._is_accepting or self._suspects.want_to_be_alone or self.absence.noticed():
            return
        room = self.slots.free(code) - len(self._suspects.starting) - self._reading.most
        self.affinity.start(room, lambda entry: self._triage.begin_noted(entry, code))
        if self.affinity.waiting:
            self._reading.cut_short()

    def _go_on(self) -> None:
        self._changed.set()
        self._read_more()

    def _arrived(self, answer: Answer) -> None:
        if not isinstance(answer, Exception):
            if answer:
                reach("taken")
                if self.link.rests:
                    self.on_first_call()
            self._take(self.queue.entries(answer))
            if self._reading.more_wait and self._reading.begun > 1:
                self._read_more()  # they come while these run
        elif isinstance(answer, CommandRefused) and is_moving(answer):
            asyncio.get_running_loop().call_later(ASK_AGAIN_S, self._read_more)
        elif isinstance(answer, CommandRefused) and self._is_accepting:
            # NOGROUP: the stream is gone. After a deletion that is as it should be; else the link makes it again.
            logger.warning("reading the queue of %s failed: %s", self.slots.spec.name, answer)
            asyncio.get_running_loop().call_later(_NEXT_TRY_S, self.link.lose)

    def _take(self, entries: Iterable[Entry]) -> None:
        if self.absence.noticed():
            self.absence.hold(entries)
        else:
            self._begin_all(entries)

    def _begin_all(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._triage.begin(entry, self._code)
        self._reading.begun = len(self.slots)
        self._answers.at_end_of_tick()

    def _freed(self, running: RunningCall) -> None:
        self._suspects.end_trial(running.entry.id)
        if self._reading.more_wait and running.needs_thread:
            self._read_more()  # the thread stands still until the next call is there
        self._answers.at_end_of_tick()

    async def _note_start(self, entry: Entry) -> bool:
        return await self.queue.note_start(self.link.sender, entry.id)

    async def _try(self, entry: Entry, code: UserCode) -> None:
        """Run a call again, once it is noted that it was started: only what was is blamed if this replica dies, too."""
        try:
            reach("note-start")
            is_mine = await self._note_start(entry)
        except (BrokerUnavailable, CommandRefused) as exc:
            logger.warning("could not note that a call runs again: %s", exc)
            self._suspects.put_back(entry)
            is_mine = False
            await asyncio.sleep(_NEXT_TRY_S)
        self._suspects.starting.discard(entry.id)
        if is_mine:
            reach("start-noted")
            self._triage.begin_noted(entry, code)
        else:
            self._suspects.end_trial(entry.id)
            self._changed.set()
        self._read_more()
