"""The calls that a replica has taken and not answered: how many there may be, and what they took."""

import asyncio
import math
import time
from bisect import bisect
from collections import deque
from collections.abc import Callable

from qserve.broker.history.buckets import BOUNDS_MS
from qserve.wire.messages import Call
from qserve.wire.spec import DeploymentSpec
from qserve_workers.calls.call_counts import CallCounts
from qserve_workers.calls.running import Conversations, RunningCall
from qserve_workers.user.user_code import UserCode

_TIMES_KEPT = 512


class Slots:
    """A call takes a slot when its replica begins to deal with it, and gives it back once, however it ends.

    Belongs to the replica's event loop.

    Args:
        changed: Set whenever a slot comes back.
        on_free: Called with every call whose slot came back.
        counts: Counts the calls that ran.

    Attributes:
        spec: The deployment as it is now.
        handled: How many calls were run to their end.
        run_times_ms: How long the last of them took.
    """

    def __init__(
        self,
        spec: DeploymentSpec,
        conversations: Conversations,
        changed: asyncio.Event,
        on_free: Callable[[RunningCall], None],
        counts: CallCounts,
    ) -> None:
        self.spec = spec
        self.counts = counts
        self.handled = 0
        self.run_times_ms: deque[float] = deque(maxlen=_TIMES_KEPT)
        self._conversations = conversations
        self._changed = changed
        self._on_free = on_free
        self._running: dict[bytes, RunningCall] = {}
        self._background: set[RunningCall] = set()
        """Calls that have their answer while their code goes on; they keep their place until it ends."""
        self._on_thread = 0

    def take(self, running: RunningCall) -> None:
        """Give a slot to a call."""
        self._running[running.entry.id] = running
        self._on_thread += running.needs_thread

    def give_back(self, running: RunningCall, *, ran: bool = False, goes_on: bool = False) -> bool:
        """Take back the slot of a call that has ended; False if it had been taken back: then somebody else answers.

        Args:
            ran: It ran to its end, and so counts as handled.
            goes_on: Its code goes on after its answer, and so keeps its place until `end_background`.
        """
        running.unwanted = True
        if running.channel is not None:
            self._conversations.close(running)
        if self._running.pop(running.entry.id, None) is None:
            return False
        if goes_on:
            self._background.add(running)
        else:
            self._on_thread -= running.needs_thread
        if ran:
            self.handled += 1
            ran_ms = (time.monotonic() - running.started_at) * 1000
            self.run_times_ms.append(ran_ms)
            counts = self.counts
            counts.runs[bisect(BOUNDS_MS, ran_ms)] += 1
            counts.ran_ms += ran_ms
            if ran_ms > counts.slow_ms:
                counts.note_slow(running, ran_ms)
        self._changed.set()
        self._on_free(running)
        return True

    def end_background(self, running: RunningCall) -> None:
        """Take back the place of a call whose code has ended after its answer; without effect for any other call."""
        if running in self._background:
            self._background.discard(running)
            self._on_thread -= running.needs_thread
            self._changed.set()
            self._on_free(running)

    def drop(self, running: RunningCall) -> bool:
        """End a call that still runs and take back its slot; False for one that has had its answer."""
        had_slot = self.give_back(running)
        if running.task is not None and (had_slot or running in self._background):
            running.task.cancel()
        return had_slot

    def get(self, entry: bytes) -> RunningCall | None:
        """The call of an entry, None if it has no slot (any more)."""
        return self._running.get(entry)

    def __contains__(self, entry: bytes) -> bool:
        return entry in self._running

    def __len__(self) -> int:
        return len(self._running) + len(self._background)

    @property
    def calls(self) -> list[RunningCall]:
        """All that run, those that have had their answer too."""
        return [*self._running.values(), *self._background]

    @property
    def entries(self) -> list[bytes]:
        """Ids of their entries."""
        return list(self._running)

    def free(self, code: UserCode) -> int:
        """How many more calls can run now."""
        running = len(self)
        if code.only_sync:
            return min(self.spec.max_concurrent_queries, self.spec.max_threads) - running
        if self._on_thread > self.spec.max_threads:
            return 0  # a call waits for the thread: leave the next one to a replica that is free
        return self.spec.max_concurrent_queries - running

    def room(self, code: UserCode, begun: int = 0) -> int:
        """How many calls to ask for now.

        Args:
            begun: How many ran after the last read; some of them may have ended.
        """
        free = self.free(code)
        if code.only_sync:
            return free
        return min(free, 1 + max(begun, len(self)))  # a burst spreads over the replicas instead of filling the first

    @property
    def longest_s(self) -> float:
        """How long the oldest call that runs here has taken; for ever, where one streams."""
        now = time.monotonic()
        return max((math.inf if each.streams else now - each.started_at for each in self.calls), default=0.0)

    @property
    def harm_nobody(self) -> bool:
        """Whether every call that runs here may run again, should this replica die; background tasks never do."""
        safe = self.spec.idempotent or all(running.call.safe for running in self._running.values())
        return safe and not self._background

    def may_run_again(self, call: Call) -> bool:
        """Whether a call may run again although it may have run already."""
        return call.safe or self.spec.idempotent
