"""What a worker's parent process writes to Redis: how far it is, and whose death it saw.

Runs on Celery's event loop, so nothing here waits longer than a second: every connection and answer has that limit,
nothing is retried in place, and while Redis is away the newest state is kept and written when it is back.
"""

import logging
import socket
import time
from collections.abc import Callable

from qserve.broker.history.totals import add_totals
from qserve.broker.history.troubles import Trouble, note_troubles
from qserve.broker.instance.heartbeats import post_tombstone
from qserve.broker.instance.presence import say_gone, say_worker_alive
from qserve.broker.instance.reports import replicas_now, report_death, report_worker
from qserve.broker.keys import Keys
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.server import redis_clients
from qserve.errors import QServeError
from qserve.wire.messages import Signer
from qserve.wire.spec import ReplicaInfo, WorkerInfo

logger = logging.getLogger(__name__)

_LIMIT_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
ALIVE_EVERY_S = 10.0
_NOTE_DEATHS_EVERY_S = 60.0
TELL_AGAIN_EVERY_S = 60.0
"""What a worker has said is forgotten when its node is silent for long, as one is that stands still."""


class Announcer:
    """Writes a worker's state and its replicas' tombstones, in order and at last.

    Args:
        by_hand: No node keeps this worker, so it says itself that it is alive.
        call_later: Runs a function after some seconds, on the same thread.
    """

    def __init__(
        self,
        url: str,
        keys: Keys,
        signer: Signer,
        deployment: str,
        node: str,
        *,
        by_hand: bool,
        call_later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self._url = url
        self._keys = keys.of(deployment)
        self._signer = signer
        self._deployment = deployment
        self._node = node
        self._by_hand = by_hand
        self._call_later = call_later
        self._client: redis_clients.Client | None = None
        self._info: WorkerInfo | None = None
        self._told_at = 0.0
        self._unwritten: list[Callable[[redis_clients.Client], object]] = []
        self._pause = 0.0
        self._deaths = 0
        self._note_deaths_at = 0.0

    def start(self) -> None:
        """Make the client; it connects when there is something to write."""
        self._client = redis_clients.client(
            self._url, _LIMIT_S, client_name=f"qserve-worker-{self._deployment}", max_connections=1
        )
        if self._by_hand:
            self._say_alive()

    def resume(self) -> None:
        """Try again now what could not be written; a server that was away may have forgotten the rest."""
        if self._info is not None:
            self.publish(self._info)
        if self._pause:
            self._pause = 0.0
            self._flush()

    def stop(self) -> None:
        """Write what is left, once, and close."""
        self._pause = 0.0
        if self._by_hand:
            self._write(lambda client: say_gone(client, self._keys, self._node))
        if self._unwritten:
            logger.warning("Deployment %s: Redis is away; this worker's last state was not written.", self._deployment)
        if self._client is not None:
            self._client.close()
            self._client = None

    def publish(self, info: WorkerInfo | None) -> None:
        """Let everyone know how far this worker is; None: that it has nothing to say any more."""
        self._info, self._told_at = info, time.monotonic()
        self._unwritten = [write for write in self._unwritten if write != self._write_info]
        self._write(self._write_info)

    def tell_again(self) -> None:
        """Say now and then what was said before; to be called every few seconds."""
        if self._info is not None and time.monotonic() - self._told_at >= TELL_AGAIN_EVERY_S:
            self.publish(self._info)

    def bury(self, replica: str, how: str) -> None:
        """Let the neighbours of a dead replica know how it died, and take over its calls."""
        self._write(lambda client: report_death(client, self._keys, self._deployment, replica, how))
        self._write(lambda client: post_tombstone(client, self._keys, self._deployment, replica, self._signer))

    def note_death(self, pid: int, how: str) -> None:
        """Let people know how a replica died; of many that die one after the other, one a minute."""
        self._deaths += 1
        if time.monotonic() < self._note_deaths_at:
            return
        self._note_deaths_at = time.monotonic() + _NOTE_DEATHS_EVERY_S
        times, self._deaths = self._deaths, 0
        who = f"pid {pid} on {socket.gethostname()}"
        note = Trouble("died", times=times, error=f"the process of a replica ended: {how}", replica=who)
        self._write(lambda client: note_troubles(client, self._keys, self._deployment, [note]))

    def count(self, what: str) -> None:
        """Add one to a total of the deployment."""
        self._write(lambda client: add_totals(client, self._keys, self._deployment, {what: 1}))

    def describe(self) -> dict[str, ReplicaInfo]:
        """This worker's deployment's replicas as they describe themselves, by id; empty when Redis is away."""
        try:
            return replicas_now(self._client, self._keys, self._deployment) if self._client else {}
        except (QServeError, CommandRefused):
            return {}

    def _write_info(self, client: redis_clients.Client) -> None:
        report_worker(client, self._keys, self._deployment, self._node, self._info)

    def _say_alive(self) -> None:
        if self._client is not None:
            if not self._unwritten:  # else Redis is away, and the first write that succeeds is soon enough
                self._write(lambda client: say_worker_alive(client, self._keys, self._node))
            self._call_later(ALIVE_EVERY_S, self._say_alive)

    def _write(self, write: Callable[[redis_clients.Client], object]) -> None:
        self._unwritten.append(write)
        if not self._pause:
            self._flush()

    def _flush(self) -> None:
        while self._unwritten and self._client is not None:
            try:
                self._unwritten[0](self._client)
            except (QServeError, CommandRefused) as exc:
                if not self._pause:
                    logger.warning("Deployment %s: cannot write to Redis, will try again: %s", self._deployment, exc)
                self._pause = min(_LONGEST_PAUSE_S, self._pause * 2 or _FIRST_PAUSE_S)
                self._call_later(self._pause, self._flush)
                return
            self._unwritten.pop(0)
        self._pause = 0.0
