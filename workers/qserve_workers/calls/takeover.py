"""Looks after the neighbours: notices replicas that died or left, and takes over the calls they had."""

import asyncio
import logging
import time
from collections import Counter

from qserve.background import end, spawn, until_next
from qserve.broker.connection import Connection
from qserve.broker.counters import count
from qserve.broker.instance.heartbeats import DIED, LEFT
from qserve.broker.link import REST_S
from qserve.errors import BrokerUnavailable
from qserve.failpoints import reach
from qserve.settings import Settings
from qserve_workers.calls.consumer import Consumer

logger = logging.getLogger(__name__)

_BATCH = 16
_ORPHANS_EVERY_S = 60.0
_WORKERS_EVERY_S = 10.0
_LOOKS = 3
_LONGEST_ROUND_S = 1.0
_LOOKED_AT = 200
"""How many neighbours are looked at with every beat. More of them are looked at less often, each by more others."""
_SOON_S = 0.2
"""How often to look while calls of a dead replica wait."""
_SPARE_UNSAFE_S = 0.2
"""So long a replica that runs calls which nobody may run again leaves suspects to others."""
_SPARE_BUSY_S = 1.0
"""So long a replica that is not idle leaves last chances to others: the successor of the dead one will be idle."""
_SPARE_LONG_S = 10.0
"""The same where a call streams or has run for a second: nothing new is read here before such calls have ended."""


def look_every_s(replicas: int, settings: Settings) -> float:
    """How often a replica looks at its neighbours, if there are so many.

    So what that costs grows with their number and not with its square. There are always some who have looked just after
    a replica beat for the last time, and they look again when it counts as dead: so it is noticed as soon.
    """
    longest = max(settings.beat_interval_s, settings.dead_after_s)
    return min(longest, settings.beat_interval_s * max(1.0, replicas / _LOOKED_AT))


class Takeover:
    """Watches the heartbeats of a deployment on this host's own monotonic clock.

    A replica is gone when a tombstone says so, or when its counter has not moved for `dead_after_s` while this
    observer's own rounds were quick and without a gap: after a pause of Redis or of this process everybody's counter
    stands still, and nobody is dead.

    Args:
        consumer: Gets the entries taken over.
        replica: Id of this replica.

    Attributes:
        is_alone: Whether the deployment has no other replica.
    """

    def __init__(self, settings: Settings, consumer: Consumer, replica: str) -> None:
        self._settings = settings
        self._consumer = consumer
        self._queue = consumer.queue
        self._replica = replica
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._own: tuple[bytes, float] = (b"", 0.0)
        self._last_round = 0.0
        self._look_every_s = settings.beat_interval_s
        self._orphans_at = time.monotonic() + _ORPHANS_EVERY_S
        self._workers_at = time.monotonic() + _WORKERS_EVERY_S
        self._silent: Counter[str] = Counter()
        self._wanted = consumer.takeover_wanted
        self.is_alone = False
        self._gone_since: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._wanted.set()
        self._task = spawn(self._watch())

    async def stop(self) -> None:
        """Watch no more."""
        await end(self._task)

    def sweep(self) -> None:
        """Look at once: somebody has seen a neighbour die."""
        self._wanted.set()

    async def _watch(self) -> None:
        loop, link = asyncio.get_running_loop(), self._consumer.link
        while True:
            pause = link.pause_s if link.rests else until_next(self._look_every_s)
            if self._gone_since:
                pause = min(pause, _SOON_S)
            timer = loop.call_later(pause, self._wanted.set)
            await self._wanted.wait()
            timer.cancel()
            self._wanted.clear()
            connection = link.sender
            if not connection.is_open:
                self._seen.clear()
                continue
            try:
                self._consumer.mind_the_dead(await self._round(connection))
            except Exception as exc:
                self._seen.clear()
                if not isinstance(exc, BrokerUnavailable):
                    logger.exception("looking after the neighbours failed")
                self._consumer.mind_the_dead(False)

    async def _round(self, connection: Connection) -> bool:
        """Look once; whether calls of dead replicas wait until this one, or another, has room."""
        started = time.monotonic()
        beats = await self._queue.heartbeats(connection)
        now = time.monotonic()
        longest_gap_s = self._look_every_s + 2 * self._settings.beat_interval_s
        paused = now - started > _LONGEST_ROUND_S or now - self._last_round > longest_gap_s
        self._look_every_s = REST_S if self._consumer.link.rests else look_every_s(len(beats), self._settings)
        self._last_round = now
        if paused or not self._beats_myself(beats.get(self._replica, b""), now):
            self._seen.clear()
        gone = [(id_, beat) for id_, beat in beats.items() if id_ != self._replica and self._is_gone(id_, beat, now)]
        self._seen = {id_: seen for id_, seen in self._seen.items() if id_ in beats}
        self._gone_since = {id_: self._gone_since.get(id_, now) for id_, _ in gone}
        self.is_alone = len(beats) == 1 + len(gone)
        waiting = [await self._take_all(connection, id_, beat) for id_, beat in gone]
        if now >= self._orphans_at:
            self._orphans_at = now + _ORPHANS_EVERY_S
            await self._queue.adopt_orphans(connection)
        if now >= self._workers_at:
            self._workers_at = now + _WORKERS_EVERY_S
            await self.forget_workers(connection)
        return any(waiting)

    async def forget_workers(self, connection: Connection) -> None:
        """Remove what workers told that were silent each of the last few times this looked."""
        silent = await self._queue.silent_workers(connection)
        self._silent = Counter({node: self._silent[node] + 1 for node in silent})
        for node, looks in self._silent.items():
            if looks >= _LOOKS:
                await self._queue.forget_worker(connection, node)

    def _beats_myself(self, beat: bytes, now: float) -> bool:
        """Whether this replica's own counter moves: where it does not, Redis takes nobody's beats."""
        if beat != self._own[0]:
            self._own = (beat, now)
        return now - self._own[1] < 3 * self._settings.beat_interval_s

    def _is_gone(self, replica: str, beat: bytes, now: float) -> bool:
        if beat in (DIED.encode(), LEFT.encode()):
            return True
        seen = self._seen.get(replica)
        if seen is None or seen[0] != beat:
            self._seen[replica] = (beat, now)
            return False
        return now - seen[1] >= self._settings.dead_after_s

    async def _take_all(self, connection: Connection, replica: str, beat: bytes) -> bool:
        """Take what this replica can take now; whether it would take more if it had room."""
        total, cause = 0, ""
        while (room := self._consumer.room_to_rerun) or not self._consumer.slots.spec.idempotent:
            # Calls that nobody may run again are only answered: for those there is always room.
            most, up_to = min(room, _BATCH) or _BATCH, self._highest_start(replica) if room else 0
            reach("take")
            entries = await self._queue.take(connection, replica, beat, most=most, up_to=up_to)
            if not entries:
                break
            reach("took")
            total += len(entries)
            cause = cause or await self._queue.problem_of(connection, replica)
            self._consumer.take_over([entry._replace(cause=cause) for entry in entries])
        if total:
            logger.info("took over %d calls of replica %s", total, replica)
            count(connection, self._settings.keys, "taken_over", total)
        reach("retire")
        if await self._queue.retire(connection, replica):
            self._gone_since.pop(replica, None)
            return False
        return not self._consumer.room_to_rerun

    def _highest_start(self, replica: str) -> int:
        """Which start of a call may come next here, of calls that the replica had; 1: of those it never started.

        A suspect may take this replica down, too. So those that run calls which must not run twice wait a moment for
        others to take it. The last chance of a call, which is alone, is best had where nothing has to end first.
        """
        slots, last = self._consumer.slots, self._settings.max_deliveries
        waited = time.monotonic() - self._gone_since.get(replica, 0.0)
        if not slots or waited >= (_SPARE_LONG_S if slots.longest_s > _SPARE_BUSY_S else _SPARE_BUSY_S):
            return last + 1  # those who come after the last are only answered
        return last - 1 if slots.harm_nobody or waited >= _SPARE_UNSAFE_S else 1
