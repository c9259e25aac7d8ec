"""Waiting for the ends of durable calls: an inbox is told of them, and the records are looked at now and then."""

import asyncio
import time
from collections.abc import Callable, Container
from functools import partial
from typing import Protocol

import msgspec

from qserve.background import spawn
from qserve.broker.connection import Answer
from qserve.broker.link import Link
from qserve.broker.payloads import Payloads, result_id
from qserve.broker.records import Records
from qserve.broker.redis_errors import CommandRefused
from qserve.durable.by_id import CallsById
from qserve.errors import BrokerUnavailable, CallCancelled, CallNotFound, FrameRejected, QServeError
from qserve.wire.call_record import ANYONE, NEWS, PART, PROGRESS
from qserve.wire.messages import Outcome, Reply

_EXPIRY_SHOWS_S = 0.05
_LOOK_AGAIN_S = 30.0
"""An inbox is told of every end; looking again now and then finds what was missed while the inbox counted as dead."""


class DurableWatcher(Protocol):
    """Somebody in this process who waits for a durable call."""

    def on_outcome(self, outcome: Outcome, /) -> None:
        """The call has ended so."""

    def on_progress(self, packed: bytes, /) -> None:
        """The call has reported something."""

    def on_news(self) -> None:
        """There is another part of the result."""


class CallWatcher:
    """A watcher that is made of functions."""

    __slots__ = ("on_news", "on_outcome", "on_progress")

    def __init__(
        self,
        on_outcome: Callable[[Outcome], None],
        on_progress: Callable[[bytes], None],
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        self.on_news = on_news
        self.on_outcome = on_outcome
        self.on_progress = on_progress


class Watchers:
    """Those in this process who wait for the ends of durable calls. Belongs to the event loop of its client.

    Each watcher gets one outcome.

    Args:
        process: Id of the inbox that gets the outcomes.
        link: The connection for commands.
    """

    def __init__(self, records: Records, payloads: Payloads, by_id: CallsById, process: str, link: Link) -> None:
        self._records = records
        self._payloads = payloads
        self._by_id = by_id
        self._process = process
        self._link = link
        self._watchers: dict[str, list[DurableWatcher]] = {}
        self._expiring: dict[str, asyncio.TimerHandle] = {}  # no replica tells of a call that none looks at
        self._look_at = time.monotonic() + _LOOK_AGAIN_S

    def watch(self, call_id: str, watcher: DurableWatcher) -> None:
        """Tell a watcher of the end of a call that this client submits."""
        self._watchers.setdefault(call_id, []).append(watcher)
        self._link.expect()

    def __len__(self) -> int:
        return len(self._watchers)

    def attach(self, call_id: str, watcher: DurableWatcher) -> None:
        """Tell a watcher of the end of any call, soon if it has ended already."""
        self.watch(call_id, watcher)
        self.look(call_id)

    def forget(self, call_id: str, watcher: DurableWatcher) -> None:
        """Forget a watcher, if it is known."""
        watchers = self._watchers.get(call_id)
        if watchers is not None and watcher in watchers:
            watchers.remove(watcher)
            if not watchers:
                del self._watchers[call_id]
                self._expect_no_more(call_id)

    def take(self, reply: Reply) -> None:
        """Hand what the inbox has received about a durable call to its watchers."""
        watchers = self._watchers.get(reply.id)
        if watchers is None:
            return
        if reply.kind == PROGRESS:
            for watcher in list(watchers):
                watcher.on_progress(reply.payload)
        elif reply.kind in (NEWS, PART):
            for watcher in list(watchers):
                watcher.on_news()
        elif reply.out_of_line:
            spawn(self._fetch(reply))
        else:
            self.settle(reply.id, reply)

    def settle(self, call_id: str, outcome: Outcome) -> None:
        """Tell the watchers of a call how it has ended."""
        self._expect_no_more(call_id)
        for watcher in self._watchers.pop(call_id, ()):
            watcher.on_outcome(outcome)

    async def _fetch(self, reply: Reply) -> None:
        sender = self._link.sender
        if not sender.is_open:
            return  # `link_up` looks again
        try:
            result = await self._payloads.fetch(sender, result_id(reply.id))
            if result is None:
                raise FrameRejected("it is gone from Redis")
            self.settle(reply.id, Reply(reply.id, ANYONE, reply.kind, result))
        except BrokerUnavailable:
            return
        except (QServeError, CommandRefused, msgspec.DecodeError) as exc:
            self.settle(
                reply.id, BrokerUnavailable(f"the call has ended, but its large result could not be fetched: {exc}")
            )

    def look(self, call_id: str) -> None:
        """Ask for the record of a call, and tell its watchers what it says."""
        sender = self._link.sender
        if sender.is_open:
            self._records.attach(sender, call_id, self._process, partial(self._looked, call_id))

    def _looked(self, call_id: str, answer: Answer) -> None:
        if isinstance(answer, Exception):
            if isinstance(answer, CommandRefused):
                self.settle(call_id, BrokerUnavailable(f"Redis refused to show the record of the call: {answer}"))
            return
        if answer is None:
            self.settle(call_id, CallNotFound(f"there is no durable call {call_id!r}, or its record has expired"))
            return
        _, _, _, result, progress, left_ms = answer
        try:
            for frame in (progress, result):
                if frame is not None:
                    self.take(self._by_id.open(frame, call_id))
        except (FrameRejected, msgspec.DecodeError) as exc:
            self.settle(call_id, exc if isinstance(exc, QServeError) else FrameRejected(str(exc)))
        if left_ms and int(left_ms) < 0:
            self._by_id.expire(call_id)
        elif left_ms:
            self.look_when_expired(call_id, int(left_ms) / 1000)

    def look_when_expired(self, call_id: str, seconds: float) -> None:
        """Look at the record of a call when it has expired, if anybody here waits for its end until then."""
        if call_id in self._watchers and call_id not in self._expiring:
            later = asyncio.get_running_loop().call_later(seconds + _EXPIRY_SHOWS_S, self._look_again, call_id)
            self._expiring[call_id] = later

    def _look_again(self, call_id: str) -> None:
        del self._expiring[call_id]
        self.look(call_id)

    def _expect_no_more(self, call_id: str) -> None:
        if (later := self._expiring.pop(call_id, None)) is not None:
            later.cancel()

    def look_at_all(self, *, but: Container[str]) -> None:
        """Look at the records of all calls that are watched, except for some that may not have one yet."""
        self._look_at = time.monotonic() + _LOOK_AGAIN_S
        for call_id in list(self._watchers):
            if call_id not in but:
                self.look(call_id)

    def tick(self, *, but: Container[str]) -> None:
        """Look at the records now and then; to be called every second."""
        if self._watchers and time.monotonic() >= self._look_at:
            self.look_at_all(but=but)

    def stop(self) -> None:
        """End all waiting. The calls themselves go on."""
        for call_id in list(self._watchers):
            self.settle(call_id, CallCancelled("the client was stopped before the call ended; the call goes on"))
