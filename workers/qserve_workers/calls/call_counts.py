"""What a replica counts of its calls, and notes of those that went wrong, until both are written in one go."""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from typing import Final

from qserve.broker.history.buckets import BOUNDS_MS, BUCKET_S, add_counts
from qserve.broker.history.totals import UserSeries, add_series, add_totals
from qserve.broker.history.troubles import LONGEST_TEXT, Trouble, note_troubles
from qserve.broker.keys import Keys
from qserve.broker.server import redis_clients
from qserve.context import batch_sizes
from qserve.errors import FrameRejected
from qserve.telemetry.user_metrics import take_counts
from qserve.wire.exceptions import text_of, traceback_of
from qserve.wire.messages import HTTP, Call, decode_http_request, request_of
from qserve_workers.calls.running import RunningCall

logger = logging.getLogger(__name__)

_FRAMES_SHOWN: Final = 12
_MOST_NOTES: Final = 20
"""How many calls are noted between two beats; more are only counted."""


class CallCounts:
    """Counts since the last time that they were written. Belongs to the replica's event loop, except for `write`.

    Attributes:
        waits, runs: How many calls waited, and ran, for how long; `Bucket` says what the places mean.
        waited_ms, ran_ms: For how long in all.
        retries: Why calls are to run again -> how many.
        others: Outcome -> calls that did not end well; all others that ran have done so.
        lost: How many calls of replicas that died ended so, without running here.
        slow_ms: Calls that ran for longer are noted.
    """

    def __init__(self, keys: Keys, deployment: str, slow_s: float) -> None:
        self.waits = [0] * (len(BOUNDS_MS) + 1)
        self.runs = [0] * (len(BOUNDS_MS) + 1)
        self.waited_ms = self.ran_ms = 0.0
        self.others: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()
        self.lost = 0
        self.slow_ms = slow_s * 1000
        self._keys = keys
        self._deployment = deployment
        self._who = f"pid {os.getpid()} on {socket.gethostname()}"
        self._notes: list[Trouble] = []
        self._taken: tuple[dict[str, int], list[int], list[int]] | None = None
        self._totals: dict[str, int] = {}
        self._series: list[UserSeries] = []
        self._told_of_series = False
        self._taken_notes: list[Trouble] = []
        self._take_at = 0.0

    def note_slow(self, running: RunningCall, ran_ms: float) -> None:
        """Note a call that took long."""
        if len(self._notes) < _MOST_NOTES:
            self._note("slow", running, ran_ms, "", "")

    def note_failed(self, running: RunningCall, error: BaseException | str) -> None:
        """Count a call that failed, and note it."""
        self.others["failed"] += 1
        if len(self._notes) >= _MOST_NOTES:
            return
        ran_ms = (time.monotonic() - running.started_at) * 1000
        if isinstance(error, str):
            self._note("failed", running, ran_ms, error, "")
        else:
            said = f"{type(error).__name__}: {text_of(error)}"
            self._note("failed", running, ran_ms, said, traceback_of(error))

    def note_lost(self, call: Call, error: str, *, ends: bool) -> None:
        """Note a call whose replica died while it had it.

        Args:
            ends: The call ends with this; else it runs again.
        """
        self.lost += ends
        if len(self._notes) < _MOST_NOTES:
            what, request = "failed" if ends else "lost", _request_of(call)
            asked = request if request != call.id else ""
            self._notes.append(Trouble(what, call.id, asked, call.method, error=error[:LONGEST_TEXT]))

    def note_stacks(self) -> None:
        """Note where every thread of this process stands."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        text = "".join(
            f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame)[-_FRAMES_SHOWN:])}\n"
            for ident, frame in sys._current_frames().items()
        )
        self._notes.append(Trouble("stacks", error="where its threads stand", traceback=text, replica=self._who))

    def _note(self, what: str, running: RunningCall, ran_ms: float, error: str, trace: str) -> None:
        call, request = running.call, running.info.request_id
        trouble = Trouble(
            *(what, call.id, request if request != call.id else "", call.method),
            error=error[:LONGEST_TEXT],
            traceback=trace[-LONGEST_TEXT:],
            replica=self._who,
            ran_ms=round(ran_ms, 3),
        )
        self._notes.append(trouble)

    def take(self, *, at_once: bool = False) -> None:
        """Make ready what `write` is to write: notes always, counts every ten seconds."""
        if not self._taken_notes:
            self._taken_notes, self._notes = self._notes, []
        if (
            self._taken is not None
            or self._totals
            or self._series
            or (time.monotonic() < self._take_at and not at_once)
        ):
            return
        self._take_at = time.monotonic() + BUCKET_S
        self._series, dropped = take_counts()
        if dropped:
            self._totals["user_metrics dropped"] = dropped
        ran = sum(self.runs)
        if not (ran or self.others or self.retries or self.lost):
            return
        ends = {"done": max(0, ran - sum(self.others.values())), **self.others}
        if self.lost:
            ends["failed"] = self.others["failed"] + self.lost
            self.lost = 0
        self._totals |= self._add_up(ends)
        self.waited_ms = self.ran_ms = 0.0
        self.retries.clear()
        self._taken = (ends, self.waits, self.runs)
        self.waits, self.runs, self.others = [0] * len(self.waits), [0] * len(self.runs), Counter()

    def _add_up(self, ends: dict[str, int]) -> dict[str, int]:
        totals = {f"ends {outcome.replace(' ', '_')}": count for outcome, count in ends.items()}
        totals |= {f"wait {place}": count for place, count in enumerate(self.waits) if count}
        totals |= {f"run {place}": count for place, count in enumerate(self.runs) if count}
        totals |= {f"retries {why}": count for why, count in self.retries.items()}
        # What a call has waited is told from two clocks, and may come out below 0 by a trifle; a sum never falls.
        totals |= {"wait_us all": max(0, int(self.waited_ms * 1000)), "run_us all": int(self.ran_ms * 1000)}
        sizes = batch_sizes()
        while sizes:  # another loop of this process may go on counting
            size, count = sizes.popitem()
            totals[f"batch {size}"] = count
        return totals

    def write(self, client: redis_clients.Client) -> None:
        """Write what is ready, from another thread; what cannot be written stays ready.

        Raises:
            QServeError, CommandRefused: Redis cannot be told.
        """
        if self._taken_notes:
            note_troubles(client, self._keys, self._deployment, self._taken_notes)
            self._taken_notes = []
        if self._taken is not None:
            add_counts(client, self._keys, self._deployment, *self._taken)
            self._taken = None
        if self._totals:
            add_totals(client, self._keys, self._deployment, self._totals)
            self._totals = {}
        if self._series:
            if add_series(client, self._keys, self._deployment, self._series) and not self._told_of_series:
                self._told_of_series = True
                logger.warning(
                    "Deployment %s: its replicas have counted metrics with more combinations of tags than Redis keeps: "
                    "further ones are not counted. qserve_user_metrics_dropped_total says whether values are dropped.",
                    self._deployment,
                )
            self._series = []


def _request_of(call: Call) -> str:
    if call.kind == HTTP and call.payload:
        with contextlib.suppress(FrameRejected):
            return decode_http_request(call.payload).request_id
    return request_of(call)
