"""Calls on their way onto queues: those of a tick leave together, and what Redis says to them is acted on."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from qserve.background import spawn
from qserve.broker.call_queue import CALLS_PER_ADMIT, CallQueue
from qserve.broker.connection import Answer, Connection
from qserve.broker.keys import Keys
from qserve.broker.link import Link
from qserve.broker.redis_errors import NotTaken, StillMoving
from qserve.broker.refusals import FullQueues, refusal_of_all
from qserve.broker.server.clock import RedisClock
from qserve.calls.pending import PendingCall, PendingCalls
from qserve.calls.withdrawing import Withdrawals
from qserve.errors import BrokerUnavailable, QServeError
from qserve.failpoints import reach

_UNREACHABLE = "Redis cannot be reached; the call was not sent"
_STATE_PATIENCE_S, _STATE_POLL_S = 3.0, 0.1


class Admission:
    """Puts calls of one process on their queues. Belongs to the event loop of its client.

    Args:
        link: The connection for commands.
        clock: The clock of Redis, as this process knows it.
        pending: The calls of this process; one that is refused is settled there.
        sample_clock: Checks whether the clock of Redis has jumped.
    """

    def __init__(
        self,
        keys: Keys,
        link: Link,
        pending: PendingCalls,
        withdrawals: Withdrawals,
        clock: RedisClock,
        full_queues: FullQueues,
        sample_clock: Callable[[], Awaitable[None]],
    ) -> None:
        self._keys = keys
        self._link = link
        self._pending = pending
        self._withdrawals = withdrawals
        self._clock = clock
        self._full_queues = full_queues
        self._sample_clock = sample_clock
        self._batches: dict[str, list[PendingCall]] = {}
        self._queues: dict[str, CallQueue] = {}
        self._is_stopped = False
        self._tick = link.end_of_tick

    def put(self, call: PendingCall) -> None:
        """Put a call, together with the others of this tick."""
        batch = self._batches.get(call.deployment)
        if batch is not None:
            batch.append(call)
            return
        if not self._batches:
            if self._tick is None:
                asyncio.get_running_loop().call_soon(self.flush)
            else:
                self._tick.put(self._fill)
        self._batches[call.deployment] = [call]

    def flush(self) -> None:
        """Send the calls that were put. While Redis is away they wait, until `give_back` takes them back; when it has
        been away for long, they are refused at once."""
        if self._batches:
            self._fill().flush()
            reach("admit-sent")
            self._link.expect()

    def _fill(self) -> Connection:
        """Give the calls to the connection for commands, and return that; it has not written them yet."""
        sender = self._link.sender
        if not self._batches:
            return sender
        if not sender.is_open:
            if self._link.is_given_up:
                for call in self.give_back():
                    self._refuse(call, BrokerUnavailable(_UNREACHABLE))
            return sender
        reach("admit")
        batches, self._batches = self._batches, {}
        for deployment, batch in batches.items():
            queue = self._queues.get(deployment)
            if queue is None:
                queue = self._queues[deployment] = CallQueue(self._keys, deployment)
            for start in range(0, len(batch), CALLS_PER_ADMIT):
                # Not those that have ended meanwhile, cancelled or over their deadline.
                calls = [call for call in batch[start : start + CALLS_PER_ADMIT] if call.id in self._pending]
                if not calls:
                    continue
                latest = self._clock.at_ms(min([c.deadline for c in calls]))
                frames = [(c.id, c.safe, c.frame) for c in calls]
                queue.put(sender, frames, partial(self._admitted, calls), latest_ms=latest)
        return sender

    def give_back(self) -> list[PendingCall]:
        """Return the calls that were put but not sent, and forget them."""
        batches, self._batches = self._batches, {}
        return [call for batch in batches.values() for call in batch]

    def stop(self) -> None:
        """Refuse calls whose connection is lost from now on, because nobody will be there to look for them."""
        self._is_stopped = True

    def _admitted(self, calls: Sequence[PendingCall], answer: Answer) -> None:
        if isinstance(answer, StillMoving):
            for call in calls:
                self._refuse(call, answer)
        elif isinstance(answer, NotTaken) and not self._is_stopped:
            asyncio.get_running_loop().call_soon(self._put_again, calls)
        elif isinstance(answer, BrokerUnavailable) and not self._is_stopped:
            for call in calls:
                call.is_unanswered = True  # Redis may have taken it: the next link finds out
                call.safe = call.safe or self._queues[call.deployment].is_idempotent
        elif isinstance(answer, Exception) or answer[0] < 0:
            self._not_admitted(calls, answer)
        else:
            reach("admitted")
            accepted = 0
            idempotent = self._queues[calls[0].deployment].is_idempotent = answer[1] == 1
            for call, entry in zip(calls, answer[2:], strict=True):
                if entry is None:
                    self._refuse(call, self._full_queues.refusal(call.deployment, answer[0] + accepted))
                    continue
                accepted += 1
                call.admitted(entry, idempotent)
                if call.id not in self._pending and not call.is_answered:  # given up before it was admitted
                    self._withdrawals.withdraw(call)
            self._pending.tally["accepted"] += accepted

    def _not_admitted(self, calls: Sequence[PendingCall], answer: Answer) -> None:
        code = 0 if isinstance(answer, Exception) else answer[0]
        if code == -3:
            spawn(self._put_late(calls))
        elif code == -4 and self._pending.tally["accepted"]:
            self._wait_for_state(calls)
        elif (error := refusal_of_all(calls[0].deployment, answer)) is not None:
            for call in calls:
                self._refuse(call, error)

    async def _put_late(self, calls: Sequence[PendingCall]) -> None:
        """Put again what Redis took too late, or only seemed to because its clock has jumped."""
        await self._sample_clock()
        for call in calls:
            self._put_if_waited_for(call)

    def _put_again(self, calls: Sequence[PendingCall]) -> None:
        """Put calls on their queue where it is now."""
        for call in calls:
            self._put_if_waited_for(call)

    def _wait_for_state(self, calls: Sequence[PendingCall]) -> None:
        """Put again soon: Redis came back empty, and a process that knows what was deployed is about to restore it."""
        now = time.monotonic()
        for call in calls:
            if call.id not in self._pending:
                continue
            call.stateless_since = call.stateless_since or now
            if now - call.stateless_since > _STATE_PATIENCE_S:
                error = BrokerUnavailable("Redis has lost what was deployed; the call was not taken")
                self._refuse(call, error)
            else:
                asyncio.get_running_loop().call_later(_STATE_POLL_S, self._put_if_waited_for, call)

    def _put_if_waited_for(self, call: PendingCall) -> None:
        if call.id in self._pending:
            self.put(call)

    def _refuse(self, call: PendingCall, error: QServeError) -> None:
        self._pending.refuse(call, error)
