"""Looks after the neighbours: notices replicas that died or left, and takes over the calls they had."""

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter

from qserve.background import end, spawn
from qserve.broker.connection import Connection
from qserve.broker.counters import count
from qserve.broker.instance.heartbeats import DIED, LEFT
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


class Takeover:
    """Watches the heartbeats of a deployment on this host's own monotonic clock.

    A replica is gone when a tombstone says so, or when its counter has not moved for `dead_after_s` while this
    observer's own rounds were quick and without a gap: after a pause of Redis or of this process everybody's counter
    stands still, and nobody is dead.

    Args:
        consumer: Gets the entries taken over.
        replica: Id of this replica.
    """

    def __init__(self, settings: Settings, consumer: Consumer, replica: str) -> None:
        self._settings = settings
        self._consumer = consumer
        self._queue = consumer.queue
        self._replica = replica
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._own: tuple[bytes, float] = (b"", 0.0)
        self._last_round = 0.0
        self._orphans_at = time.monotonic() + _ORPHANS_EVERY_S
        self._workers_at = time.monotonic() + _WORKERS_EVERY_S
        self._silent: Counter[str] = Counter()
        self._wanted = asyncio.Event()
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
        while True:
            pause = self._settings.beat_interval_s * random.uniform(0.8, 1.2)  # noqa: S311
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), pause)
            self._wanted.clear()
            connection = self._consumer.link.sender
            if not connection.is_open:
                self._seen.clear()
                continue
            try:
                await self._round(connection)
            except BrokerUnavailable:
                self._seen.clear()
            except Exception:
                logger.exception("looking after the neighbours failed")

    async def _round(self, connection: Connection) -> None:
        started = time.monotonic()
        beats = await self._queue.heartbeats(connection)
        now = time.monotonic()
        paused = now - started > _LONGEST_ROUND_S or now - self._last_round > 3 * self._settings.beat_interval_s
        self._last_round = now
        if paused or not self._beats_myself(beats.get(self._replica, b""), now):
            self._seen.clear()
        gone = [(id_, beat) for id_, beat in beats.items() if id_ != self._replica and self._is_gone(id_, beat, now)]
        self._seen = {id_: seen for id_, seen in self._seen.items() if id_ in beats}
        for id_, beat in gone:
            await self._take_all(connection, id_, beat)
        if now >= self._orphans_at:
            self._orphans_at = now + _ORPHANS_EVERY_S
            await self._queue.adopt_orphans(connection)
        if now >= self._workers_at:
            self._workers_at = now + _WORKERS_EVERY_S
            await self.forget_workers(connection)

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

    async def _take_all(self, connection: Connection, replica: str, beat: bytes) -> None:
        total = 0
        while (room := self._consumer.room_to_rerun) or not self._consumer.slots.spec.idempotent:
            # Calls that nobody may run again are only answered: for those there is always room.
            most = min(room, _BATCH) or _BATCH
            reach("take")
            entries = await self._queue.take(connection, replica, beat, most=most, unsafe_only=not room)
            if not entries:
                break
            reach("took")
            total += len(entries)
            self._consumer.take_over(entries)
        if total:
            logger.info("took over %d calls of replica %s", total, replica)
            count(connection, self._settings.keys, "taken_over", total)
        reach("retire")
        await self._queue.retire(connection, replica)
