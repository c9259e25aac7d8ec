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

_EXPLAIN_S = 0.5
"""How long a caller waits beyond its deadline to be told why."""


class Deadlines:
    """The deadlines of one process' calls. Belongs to the event loop of its client.

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

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Use the timers of a loop."""
        self._loop = loop

    def start(self, call: PendingCall) -> None:
        """End a call at its deadline unless it has ended by then."""
        call.timer = self._loop.call_later(call.deadline - time.monotonic(), self._expire, call)

    def put_off(self, call: PendingCall, chunk: Chunk) -> None:
        """Put off the deadline of a call because of a chunk that has arrived.

        A deadline holds until the first chunk of a stream arrives. While the replica takes in what it is sent, the time
        starts anew with each sign of that.
        """
        if call.timer is None or (call.is_strict and chunk.kind in (HELLO, CREDIT)):
            return
        call.timer.cancel()
        call.timer = None
        if chunk.kind in (HELLO, CREDIT):
            call.timer = self._loop.call_later(call.timeout_s, self._expire, call)

    def _expire(self, call: PendingCall) -> None:
        if call.id in self._pending:
            spawn(self._end(call))

    async def _end(self, call: PendingCall) -> None:
        outcome = await self._explain(call)
        # In this order: a replica that is told first would answer that the call was cancelled.
        if self._pending.settle(call, outcome):
            self._withdrawals.withdraw(call)

    async def _explain(self, call: PendingCall) -> QServeError:
        with contextlib.suppress(BrokerUnavailable, TimeoutError):
            if self._link.sender.is_open:
                async with asyncio.timeout(_EXPLAIN_S):
                    seen, now = await last_seen(self._link.sender, self._keys, call.deployment)
                if now - seen > self._dead_after_s:
                    since = f" since {time.strftime('%H:%M', time.localtime(seen))}" if seen else ""
                    return DeploymentUnavailable(
                        f"no replica of {call.deployment!r} has been seen{since}; `qserve status` shows who serves it"
                    )
        return GetTimeoutError(
            f"the call to {call.deployment!r} did not end before its deadline ({call.timeout_s:g} s); it was withdrawn"
        )
