"""Calls between being made and their outcome, as the process that makes them keeps them."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable

from qserve.broker.large.lending import Lending, Loan
from qserve.calls.troubled_calls import GAVE_UP, REFUSED, TroubledCalls
from qserve.errors import QServeError, StreamBroken
from qserve.wire.channel import Channel
from qserve.wire.messages import ERROR, VALUE, Outcome
from qserve.wire.parts import flat

logger = logging.getLogger(__name__)


class PendingCall:
    """A call whose outcome somebody waits for."""

    __slots__ = (
        *("channel", "deadline", "deployment", "entry", "frame", "id", "inherited", "is_answered", "is_strict"),
        *(
            "is_unanswered",
            "loan",
            "lost_results",
            "on_outcome",
            "on_stream",
            "row",
            "safe",
            "stateless_since",
            "timeout_s",
            "timer",
        ),
    )

    def __init__(
        self,
        call_id: str,
        deployment: str,
        safe: bool,
        frame: bytes,
        loan: Loan | None,
        timeout_s: float,
        on_outcome: Callable[[Outcome], None],
    ) -> None:
        self.id = call_id
        self.deployment = deployment
        self.safe = safe
        self.frame = frame
        self.loan = loan
        """Its large payload, which replicas read here."""
        self.timeout_s = timeout_s
        self.deadline = time.monotonic() + timeout_s
        self.on_outcome = on_outcome
        self.entry: bytes | None = None
        self.stateless_since = 0.0
        self.lost_results = 0
        """How often it has run in vain, because its large result did not arrive."""
        self.is_answered = False
        """Its reply has come, which may be read before what Redis says to the call itself."""
        self.is_unanswered = False
        """The connection was lost before Redis said whether it took the call."""
        self.row: dict[PendingCall, None] | None = None
        """Where it waits for its deadline, see `Deadlines`; None where it has a timer of its own, or no deadline."""
        self.timer: asyncio.TimerHandle | None = None
        self.is_strict = False
        """Its deadline is not put off while the replica takes in what it is sent."""
        self.inherited = False
        """It was withdrawn together with the call that made it, so it is cancelled even if it is not safe."""
        self.channel: Channel | None = None
        self.on_stream: Callable[[PendingCall, Channel], None] | None = None
        """Called when the first chunk of a stream arrives. Without it, and without a channel, streams are refused."""

    def admitted(self, entry: bytes, idempotent: bool) -> None:
        """Note its entry in the queue. Only a safe call keeps its frame, which may have to be sent again.

        Args:
            idempotent: All calls of the deployment are safe.
        """
        self.entry = entry
        self.safe = self.safe or idempotent
        self.is_unanswered = False
        if not self.safe:
            self.frame = b""

    def stop_clock(self) -> None:
        """Let no deadline end it any more."""
        if self.row is not None:
            del self.row[self]
            self.row = None
        elif self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def end_channel(self, outcome: Outcome) -> None:
        """End the channel, as the call has ended."""
        assert self.channel is not None
        if isinstance(outcome, QServeError):
            self.channel.close(outcome)
        elif outcome.kind == ERROR:
            self.channel.close(StreamBroken("the call failed while it streamed"))
        else:
            self.channel.finish(int(flat(outcome.payload) or b"0") if outcome.kind == VALUE else 0)
        self.channel.on_second_peer = None
        self.channel = None  # they refer to each other, and the collector comes seldom


class PendingCalls(dict[str, PendingCall]):
    """The calls of a process that wait for their outcome, by id. Belongs to the event loop of its client.

    Whoever learns the outcome of a call settles it here; only the first outcome counts.

    Attributes:
        tally: How many calls were accepted, `refused` by which error, and `ended` with which outcome.
        troubles: Those that were refused or given up since this was told last.
    """

    def __init__(self, lending: Lending) -> None:
        super().__init__()
        self._lending = lending
        self.tally: Counter[str] = Counter()
        self.troubles = TroubledCalls()

    def settle(self, call: PendingCall, outcome: Outcome) -> bool:
        """Hand its outcome to whoever waits for a call; returns False if the call has ended already."""
        if self.pop(call.id, None) is None:
            return False
        call.stop_clock()
        if call.loan is not None:
            self._lending.end(call.loan, is_read=not isinstance(outcome, QServeError))
            call.loan = None
        if not isinstance(outcome, QServeError):
            call.is_answered = True
            self.tally["ended error" if outcome.kind == ERROR else "ended result"] += 1
        elif call.entry is not None or call.is_unanswered:
            self.tally[f"ended {outcome.code}"] += 1
            self.troubles.note(call.deployment, call.id, GAVE_UP, outcome)
        if call.channel is not None:
            call.end_channel(outcome)
        # Who waits often holds the call, too, and the collector comes seldom.
        on_outcome, call.on_outcome, call.on_stream = call.on_outcome, _nobody_waits, None
        try:
            on_outcome(outcome)
        except Exception:
            logger.exception("the receiver of call %s failed on its outcome", call.id)
        return True

    def refuse(self, call: PendingCall, error: QServeError) -> None:
        """Settle a call that Redis has not taken."""
        if call.id in self:
            self.tally[f"refused {error.code}"] += 1
            self.troubles.note(call.deployment, call.id, REFUSED, error)
        self.settle(call, error)

    def unsettled(self) -> list[PendingCall]:
        """The calls that Redis has taken, or may have taken."""
        return [call for call in self.values() if call.entry is not None or call.is_unanswered]


def _nobody_waits(_outcome: Outcome) -> None:
    """Take the outcome of a call that has been settled."""
