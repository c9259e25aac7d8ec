"""After Redis was away: looks for the calls that are pending, and settles those that are lost."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from qserve.broker.call_queue import CALLS_PER_ADMIT, CallQueue
from qserve.broker.connection import Connection
from qserve.broker.counters import count
from qserve.broker.keys import Keys
from qserve.broker.link import Link
from qserve.calls.admission import Admission
from qserve.calls.pending import PendingCall, PendingCalls
from qserve.calls.receiver import Receiver
from qserve.errors import BrokerUnavailable, Indeterminate, QServeError
from qserve.wire.messages import Signer, decode_call, encode_bare

_POLL_S = 0.01
_SECOND_LOOK_S = 0.5
"""What a lost connection still held may arrive so much later."""
_MARGIN_MS = 10_000
_MOST_RUNS = 3
"""How often a call may run whose results are lost: as often as one whose replicas die."""
_WINDOW_S, _SHARE, _FEWEST = 10.0, 0.1, 10

_LOST = "Redis lost the call or its answer while it was away; it may have run"
_UNTAKEN = "the connection to Redis was lost while it took the call; it may have run"
_LATER = "Redis lost the call while it was away, and many others with it; it can be sent again"


class RetryBudget:
    """How many calls may be sent again: a tenth of those sent in the last ten seconds, or a few.

    When Redis loses calls, or large results, it loses those of many clients. If all were sent again at once, they would
    overload it.
    """

    def __init__(self) -> None:
        self._sent: deque[tuple[float, int]] = deque()
        self._again: deque[float] = deque()

    def note(self, sent: int, now: float) -> None:
        """Note how many calls were sent in all until now. To be called once a second."""
        self._sent.append((now, sent))
        while self._sent[0][0] < now - _WINDOW_S:
            self._sent.popleft()

    def take(self, now: float) -> bool:
        """Whether one more may be sent again."""
        while self._again and self._again[0] < now - _WINDOW_S:
            self._again.popleft()
        sent = self._sent[-1][1] - self._sent[0][1] if self._sent else 0
        if len(self._again) >= max(_FEWEST, int(sent * _SHARE)):
            return False
        self._again.append(now)
        return True


class Reconciler:
    """Settles what a lost connection left open. Belongs to the event loop of its client.

    A call whose entry stands in the queue goes on. One without an entry is answered, and then the answer stands in the
    inbox; or it is lost: a safe one is sent again, once and within the budget, of another nobody knows whether it ran.

    Args:
        new_id: Gives the id of a call that is sent again.
    """

    def __init__(
        self,
        keys: Keys,
        signer: Signer,
        link: Link,
        receiver: Receiver,
        pending: PendingCalls,
        admission: Admission,
        *,
        new_id: Callable[[], str],
    ) -> None:
        self.budget = RetryBudget()
        self._keys = keys
        self._signer = signer
        self._link = link
        self._receiver = receiver
        self._pending = pending
        self._admission = admission
        self._new_id = new_id

    async def run(self) -> None:
        """Look once; the next link looks again if this one is lost meanwhile."""
        sender, losses = self._link.sender, self._link.losses
        calls = self._pending.unsettled()
        if not sender.is_open or not calls:
            return
        with contextlib.suppress(BrokerUnavailable):
            taken = [call for call in calls if call.entry is not None]
            unanswered = [call for call in calls if call.is_unanswered]
            missing = await self._missing(sender, taken) + await self._unfound(sender, unanswered)
            if any(call.is_unanswered for call in missing):
                await asyncio.sleep(_SECOND_LOOK_S)
                unanswered = [call for call in missing if call.is_unanswered]
                missing = [call for call in missing if not call.is_unanswered]
                missing += await self._unfound(sender, unanswered)
            # Answering removes the entry: what is gone by now has its answer in the inbox by now, or is lost.
            newest = await self._receiver.newest(sender)
            while not self._receiver.has_seen(newest):
                await asyncio.sleep(_POLL_S)
                if self._link.losses != losses:
                    return
            self._settle(missing)

    async def _missing(self, sender: Connection, calls: Sequence[PendingCall]) -> list[PendingCall]:
        found = await asyncio.gather(
            *(CallQueue(self._keys, call.deployment).has(sender, call.entry or b"") for call in calls)
        )
        return [call for call, is_there in zip(calls, found, strict=True) if not is_there]

    async def _unfound(self, sender: Connection, calls: Sequence[PendingCall]) -> list[PendingCall]:
        """Return the calls that Redis has not taken, and note the entries of the others."""
        by_deployment: dict[str, list[PendingCall]] = {}
        for call in calls:
            by_deployment.setdefault(call.deployment, []).append(call)
        missing: list[PendingCall] = []
        for deployment, its in by_deployment.items():
            queue = CallQueue(self._keys, deployment)
            now = time.monotonic()
            age_ms = int(max(now - call.deadline + call.timeout_s for call in its) * 1000) + _MARGIN_MS
            for start in range(0, len(its), CALLS_PER_ADMIT):
                part = its[start : start + CALLS_PER_ADMIT]
                entries = await queue.find(sender, [call.id for call in part], age_ms)
                for call, entry in zip(part, entries, strict=True):
                    if entry is None:
                        missing.append(call)
                    else:
                        call.admitted(entry, call.safe)
        return missing

    def _settle(self, missing: Sequence[PendingCall]) -> None:
        waiting = set(self._pending.unsettled())
        for call in missing:
            if call not in waiting:  # its answer has come, or its time is over
                continue
            if not call.safe:
                self._give_up(call, Indeterminate(_UNTAKEN if call.is_unanswered else _LOST))
            elif not self._send_again(call):
                self._give_up(call, BrokerUnavailable(_LATER))

    def _give_up(self, call: PendingCall, error: QServeError) -> None:
        if isinstance(error, Indeterminate):
            count(self._link.sender, self._keys, "indeterminate")
        self._pending.settle(call, error)

    def run_again(self, call: PendingCall) -> bool:
        """Put a call once more that has run, but whose result is lost; returns whether it may run again."""
        if not call.safe or call.lost_results >= _MOST_RUNS - 1:
            return False
        call.lost_results += 1
        return self._send_again(call)

    def _send_again(self, call: PendingCall) -> bool:
        """Put a safe call once more, within the budget; returns whether that could be done.

        It gets another id: the first copy may still be somewhere, and is answered apart.
        """
        if not call.frame or call.channel is not None or not self.budget.take(time.monotonic()):
            return False
        lost = decode_call(self._signer.open(call.frame))
        del self._pending[call.id]
        call.id = self._new_id()
        call.entry, call.is_unanswered = None, False
        left_ms = int((call.deadline - time.monotonic()) * 1000)
        again = msgspec.structs.replace(lost, id=call.id, ttl_ms=max(0, left_ms))
        call.frame = self._signer.seal(encode_bare(again))
        self._pending[call.id] = call
        self._pending.tally["sent again"] += 1
        self._admission.put(call)
        return True
