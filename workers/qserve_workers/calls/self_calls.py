"""Finds calls that can never start, because the only replica is full of calls that wait for them."""

import logging
from collections.abc import Collection
from functools import partial
from typing import NamedTuple

from qserve.background import spawn
from qserve.broker.connection import Answer
from qserve.broker.inboxes import send_reply
from qserve.broker.link import Link
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.replica_queue import Entry, ReplicaQueue
from qserve.errors import BrokerUnavailable, FrameRejected, GetTimeoutError
from qserve.settings import Settings
from qserve.wire.messages import ERROR, Call, Reply, Signer, decode_call, lineage_of
from qserve_workers.calls.ordinary_calls import OrdinaryRuns
from qserve_workers.calls.running import RunningCall
from qserve_workers.calls.slots import Slots
from qserve_workers.user.user_code import UserCode

logger = logging.getLogger(__name__)

_MOST = 1000
"""How many calls of the queue are looked at."""


class _Blocked(NamedTuple):
    """A call that waits for room: in the queue, or here for a thread."""

    call: Call
    entry: Entry
    running: RunningCall | None = None


class SelfCalls:
    """Ends one of them at a time, so that the others may go on. Belongs to the replica's event loop.

    A call that is made while another one runs carries the ids of all calls that it is a part of. So a replica can see
    whether everything that its calls wait for is, in the end, a call that waits for this replica.
    """

    def __init__(
        self, settings: Settings, signer: Signer, queue: ReplicaQueue, link: Link, slots: Slots, ordinary: OrdinaryRuns
    ) -> None:
        self._keys = settings.keys
        self._signer = signer
        self._queue = queue
        self._link = link
        self._slots = slots
        self._ordinary = ordinary
        self._before: frozenset[str] = frozenset()

    def look(self, code: UserCode | None, *, is_only: bool) -> None:
        """Look for such calls, about once a second; costs nothing while there is room, or nobody waits.

        Args:
            is_only: Whether the deployment has no other replica.
        """
        spec = self._slots.spec
        awaited: frozenset[str] = frozenset()
        waiting: list[RunningCall] = []
        if code is not None and is_only and spec.num_replicas == 1 and spec.autoscaling is None:
            on_threads = [running for running in self._slots.calls if running.needs_thread]
            waiting = on_threads[spec.max_threads :]
            if waiting or self._slots.free(code) <= 0:
                awaited = _awaited_by(on_threads[: spec.max_threads] if waiting else self._slots.calls)
        if awaited and awaited == self._before and self._link.sender.is_open:
            spawn(self._end_one(awaited, waiting))
        self._before = awaited

    async def _end_one(self, awaited: frozenset[str], waiting: Collection[RunningCall]) -> None:
        blocked = [_Blocked(running.call, running.entry, running) for running in waiting]
        try:
            blocked += self._opened(await self._queue.unread(self._link.sender, _MOST))
        except (BrokerUnavailable, CommandRefused) as exc:
            logger.debug("cannot look at the queue: %s", exc)
            return
        hopeless = {id_ for each in blocked for id_ in lineage_of(each.call).split()}
        if not awaited <= hopeless:
            return  # something that the calls here wait for may still end
        here = {running.call.id for running in self._slots.calls} - {running.call.id for running in waiting}
        for each in blocked:
            if here & set(lineage_of(each.call).split()):
                self._refuse(each)
                return

    def _opened(self, entries: Collection[Entry]) -> list[_Blocked]:
        found = []
        for entry in entries:
            if not entry.durable:
                try:
                    found.append(_Blocked(decode_call(self._signer.open(entry.frame)), entry))
                except FrameRejected:
                    continue  # whoever reads it says so
        return found

    def _refuse(self, blocked: _Blocked) -> None:
        name = self._slots.spec.name
        error = GetTimeoutError(
            f"the call to {name!r} would never start: the only replica has no room until the calls that it runs have "
            "ended, and they wait for this one. Give the deployment more replicas, or more room in each (max_threads "
            "for `def`, max_concurrent_queries for `async def`), or call the method itself instead of a handle"
        )
        logger.warning("Deployment %s: request %s: %s", name, blocked.call.id, error)
        if blocked.running is not None:
            self._slots.drop(blocked.running)
            self._ordinary.refuse(blocked.entry, blocked.call, error)
            return
        reply = Reply(blocked.call.id, blocked.call.reply_to, ERROR, self._ordinary.pack_error(error))
        self._queue.withdraw(self._link.sender, blocked.entry.id, partial(self._withdrawn, reply))

    def _withdrawn(self, reply: Reply, answer: Answer) -> None:
        if answer == 1:
            send_reply(self._link.sender, self._keys, self._signer, reply)


def _awaited_by(calls: Collection[RunningCall]) -> frozenset[str]:
    """The ids of all calls that these wait for; none if one of them waits for nothing."""
    awaited: set[str] = set()
    for running in calls:
        own = [nested.awaited for nested in list(running.info.nested) if nested.awaited]
        if not own:
            return frozenset()
        awaited.update(own)
    return frozenset(awaited)
