"""Deadlines of calls: started, put off while a stream goes on, and explained when they pass."""

import asyncio
import contextlib
import time

from qserve.background import spawn
from qserve.broker.call_queue import last_seen
from qserve.broker.keys import Keys
from qserve.broker.link import Link
from qserve.calls.pending import PendingCall, PendingCalls
from qserve.calls.withdrawing import Withdrawals
from qserve.errors import BrokerUnavailable, DeploymentUnavailable, GetTimeoutError, QServeError
from qserve.wire.channel import CREDIT, HELLO, Chunk
from qserve.wire.spec import pause_of

_EXPLAIN_S = 0.5
"""How long a caller waits beyond its deadline to be told why."""

_MOST_ROWS = 64
_SOON_S = 0.001
"""A timer may come a moment early; it does not come again at once."""


class Deadlines:
    """The deadlines of one process' calls. Belongs to the event loop of its client.

    Calls with the same time wait in a row, in the order of their deadlines, and a row has one timer: starting and
    stopping a timer for each call takes as long as signing it.

    Args:
        dead_after_s: If no replica of the deployment was seen for so many seconds, the error says that there is none.
    """

    def __init__(
        self, keys: Keys, link: Link, pending: PendingCalls, withdrawals: Withdrawals, dead_after_s: float
    ) -> None:
        self._keys = keys
        self._link = link
        self._pending = pending
        self._withdrawals = withdrawals
        self._dead_after_s = dead_after_s
        self._loop: asyncio.AbstractEventLoop
        self._rows: dict[float, dict[PendingCall, None]] = {}
        """By the time of their calls. Each has a timer, and goes when that finds it empty."""

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Use the timers of a loop."""
        self._loop = loop

    def start(self, call: PendingCall) -> None:
        """End a call at its deadline unless it has ended by then."""
        row = self._rows.get(call.timeout_s)
        if row is None:
            left_s = call.deadline - time.monotonic()
            if len(self._rows) >= _MOST_ROWS:
                # Such as those of calls within calls, which have the time that is left to the outer ones.
                call.timer = self._loop.call_later(left_s, self._expire, call)
                return
            row = self._rows[call.timeout_s] = {}
            self._loop.call_later(left_s, self._look, call.timeout_s)
        row[call] = None
        call.row = row

    def put_off(self, call: PendingCall, chunk: Chunk) -> None:
        """Put off the deadline of a call because of a chunk that has arrived.

        A deadline holds until the first chunk of a stream arrives. While the replica takes in what it is sent, the time
        starts anew with each sign of that.
        """
        if (call.row is None and call.timer is None) or (call.is_strict and chunk.kind in (HELLO, CREDIT)):
            return
        call.stop_clock()
        if chunk.kind in (HELLO, CREDIT):
            call.timer = self._loop.call_later(call.timeout_s, self._expire, call)

    def _look(self, timeout_s: float) -> None:
        """End the calls of a row whose deadline has passed."""
        row = self._rows[timeout_s]
        now = time.monotonic()
        while row:
            call = next(iter(row))
            if call.deadline > now:
                self._loop.call_later(max(call.deadline - now, _SOON_S), self._look, timeout_s)
                return
            call.stop_clock()
            self._expire(call)
        del self._rows[timeout_s]

    def _expire(self, call: PendingCall) -> None:
        if call.id in self._pending:
            spawn(self._end(call))

    async def _end(self, call: PendingCall) -> None:
        outcome = await self._explain(call)
        # In this order: a replica that is told first would answer that the call was cancelled.
        if self._pending.settle(call, outcome):
            self._withdrawals.withdraw(call)

    async def _explain(self, call: PendingCall) -> QServeError:
        paused = ""
        with contextlib.suppress(BrokerUnavailable, TimeoutError):
            if self._link.sender.is_open:
                async with asyncio.timeout(_EXPLAIN_S):
                    seen, now, paused = await last_seen(self._link.sender, self._keys, call.deployment)
                if now - seen > self._dead_after_s:
                    since = f" since {_clock(seen)}" if seen else ""
                    return DeploymentUnavailable(
                        f"no replica of {call.deployment!r} has been seen{since}; `qserve status` shows who serves it"
                    )
        text = (
            f"the call to {call.deployment!r} did not end before its deadline ({call.timeout_s:g} s); it was withdrawn"
        )
        if paused:
            # Not by whom: HTTP clients are told this, too.
            at, _ = pause_of(paused)
            since = f" since {_clock(at)}" if at else ""
            text += (
                f". {call.deployment!r} is paused{since}: calls are accepted, but wait until an operator resumes it "
            )
            text += "(`qserve status` shows who has paused it)"
        return GetTimeoutError(text)


def _clock(at: float) -> str:
    return time.strftime("%H:%M", time.localtime(at))
