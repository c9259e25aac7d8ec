"""What becomes of an entry that this replica was given: it runs, waits for its trial, or is answered at once."""

import asyncio
from functools import partial

from qserve.background import spawn
from qserve.broker.counters import count
from qserve.broker.link import Link
from qserve.broker.replica_queue import Entry
from qserve.broker.stream_ids import order
from qserve.errors import BrokerUnavailable, CallCancelled, FrameRejected, Indeterminate, PoisonCall, ReplicaDied
from qserve.settings import Settings
from qserve.wire.call_record import DurableCall
from qserve.wire.messages import MODEL, Call
from qserve_workers.calls.answers import Answers
from qserve_workers.calls.arrivals import Arrivals
from qserve_workers.calls.durable_calls import DurableRuns
from qserve_workers.calls.model_affinity import ModelAffinity
from qserve_workers.calls.ordinary_calls import OrdinaryRuns
from qserve_workers.calls.running import RunningCall
from qserve_workers.calls.slots import Slots
from qserve_workers.calls.suspects import Suspects
from qserve_workers.calls.withdrawn_calls import WithdrawnCalls
from qserve_workers.user.user_code import UserCode

_FORGOTTEN = "Redis was restarted or replaced and may have lost that the call ran: it does not run again"


class Triage:
    """Decides on entries, and starts the calls that run. Belongs to the replica's event loop.

    A call taken before its replica died comes here a second time only if it is safe to run again. Then it runs as
    soon as there is room, the last time alone, and after `max_deliveries` it goes to the dead letters.

    Attributes:
        before: Order of the last entry of before a restart of the server, where unsafe calls from then must not run.
    """

    def __init__(
        self,
        settings: Settings,
        link: Link,
        slots: Slots,
        arrivals: Arrivals,
        answers: Answers,
        ordinary: OrdinaryRuns,
        durable: DurableRuns,
        suspects: Suspects,
        withdrawn: WithdrawnCalls,
        affinity: ModelAffinity,
    ) -> None:
        self.before: tuple[int, int] | None = None
        self._keys = settings.keys
        self._max_deliveries = settings.max_deliveries
        self._link = link
        self._slots = slots
        self._arrivals = arrivals
        self._answers = answers
        self._ordinary = ordinary
        self._durable = durable
        self._suspects = suspects
        self._withdrawn = withdrawn
        self._affinity = affinity
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self, entry: Entry, code: UserCode | None) -> None:
        """Decide on an entry."""
        if entry.id in self._slots:
            return  # the server has forgotten that it gave it to us, and did so again
        try:
            call, again = self._arrivals.open(entry)
        except FrameRejected as exc:
            self._reject(entry, exc)
            return
        if entry.id in self._withdrawn and not entry.durable:
            self._ordinary.refuse(entry, call, CallCancelled("the caller left first"))
        elif entry.deliveries > 1:
            self._begin_again(entry, call)
        elif (again or (self.before is not None and order(entry.id) <= self.before)) and not self._slots.may_run_again(
            call
        ):
            # The server has forgotten that it gave this call out, to us or, where it is strict about it, to anybody.
            count(self._link.sender, self._keys, "indeterminate")
            self._ordinary.refuse(entry, call, Indeterminate(_FORGOTTEN))
        else:
            assert code is not None, "whoever cannot run calls takes none that may run"
            if not (call.meta and self._is_placed(entry, call, code)):
                self._start(entry, call, code)

    def begin_noted(self, entry: Entry, code: UserCode) -> None:
        """Run a suspect, or a call that was handed over, of which it is noted that it is started."""
        call, _ = self._arrivals.open(entry)
        self._start_if_wanted(entry, call, code)

    def _is_placed(self, entry: Entry, call: Call, code: UserCode) -> bool:
        keep = partial(self._start_if_wanted, entry, call, code)
        return self._affinity.places(entry.id, call.meta.get(MODEL, ""), keep, partial(self._arrivals.forget, call.id))

    def _reject(self, entry: Entry, error: FrameRejected) -> None:
        if entry.durable:
            self._answers.note_rejected(error)
            spawn(self._durable.reject(entry, self._slots.spec.name, error))
        else:
            spawn(self._answers.reject(entry, error))

    def _start_if_wanted(self, entry: Entry, call: Call, code: UserCode) -> None:
        if entry.id in self._withdrawn and not entry.durable:
            self._ordinary.refuse(entry, call, CallCancelled("the caller left first"))
        else:
            self._start(entry, call, code)

    def _start(self, entry: Entry, call: Call, code: UserCode) -> None:
        running = RunningCall(entry, call, code.needs_thread(call.method))
        self._slots.take(running)
        # asyncio.create_task makes a system call to find the loop.
        loop = self._loop = self._loop or asyncio.get_running_loop()
        if isinstance(call, DurableCall):
            running.task = loop.create_task(self._durable.run(running, call, code), context=code.context.copy())
        elif not self._arrivals.claims or self._slots.may_run_again(call):
            running.task = loop.create_task(self._ordinary.run(running, code), context=code.context.copy())
        else:
            self._arrivals.claim(call, partial(self._claimed, running, code))

    def _claimed(self, running: RunningCall, code: UserCode, first: bool | BrokerUnavailable) -> None:
        """Run a call that nobody has run; the answer to one that somebody has is theirs to give."""
        entry = running.entry
        if first is True and entry.id in self._slots:
            running.unwanted = running.unwanted or entry.id in self._withdrawn
            running.task = asyncio.create_task(self._ordinary.run(running, code), context=code.context.copy())
        elif self._slots.give_back(running):
            if isinstance(first, BrokerUnavailable):
                self._ordinary.refuse(entry, running.call, first)
            else:
                self._reject(entry, FrameRejected("a call that was run before"))

    def _begin_again(self, entry: Entry, call: Call) -> None:
        """Settle a call whose replica died, or keep it for a trial: it may have been what killed it."""
        name, cause = self._slots.spec.name, f" ({entry.cause})" if entry.cause else ""
        if not self._slots.may_run_again(call):
            text = f"a replica of {name!r} died while it had the call{cause}; it may have run: it does not run again"
            self._slots.counts.note_lost(call, f"ReplicaDied: {text}", ends=True)
            self._ordinary.refuse(entry, call, ReplicaDied(text))
        elif entry.deliveries > self._max_deliveries:
            retries = self._max_deliveries - 1
            text = f"Task failed with {retries} retries: every replica of {name!r} that had the call died{cause}"
            if isinstance(call, DurableCall):
                self._durable.bury(entry, call, text, PoisonCall(text))
            else:
                self._slots.counts.note_lost(call, f"PoisonCall: {text}", ends=True)
                spawn(self._answers.bury(entry, call, text, self._ordinary.pack_error(PoisonCall(text))))
        else:
            text = f"a replica died while it had the call{cause}; it runs again"
            self._slots.counts.note_lost(call, text, ends=False)
            self._slots.counts.retries["replica_died"] += 1
            self._suspects.add(entry)
