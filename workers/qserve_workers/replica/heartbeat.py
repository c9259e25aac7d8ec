"""Says that a replica lives, from a thread that user code cannot block, while its event loop makes progress."""

import asyncio
import faulthandler
import logging
import threading
import time
from collections.abc import Callable

from qserve.background import until_next
from qserve.broker.instance.heartbeats import beat
from qserve.broker.link import REST_S
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.server import redis_clients
from qserve.errors import QServeError
from qserve.failpoints import reach
from qserve.settings import Settings

logger = logging.getLogger(__name__)

_LONGEST_GAP_S = 2.0
_COMMAND_TIMEOUT_S = 2.0
_ARM_AGAIN = 0.1
"""In parts of `max_loop_stall_s`."""
_STDERR = 2
"""The descriptor: Celery puts an object without one in place of sys.stderr."""


class Heartbeat:
    """Beats once per `beat_interval_s`, or REST_S while it rests, as long as the loop ticks.

    A loop that has not ticked for `max_loop_stall_s` ends the process: the stacks of all threads go to stderr, even if
    user code holds the interpreter lock, and the worker replaces the replica.

    Args:
        entries: Entry ids of the calls in hand, asked for on the loop.
        on_lost: Gets the ids that others have taken over, on the loop.
        on_tick: Called on the loop with every beat.
        on_beat: Called on the thread, with its connection, after every beat.
        on_look: Called on the thread with its connection and how long the loop has not done what it was asked to.

    Attributes:
        rests: Whether nobody would miss the beats between.
    """

    def __init__(
        self,
        settings: Settings,
        deployment: str,
        replica: str,
        *,
        entries: Callable[[], list[bytes]],
        on_lost: Callable[[list[bytes]], None],
        on_tick: Callable[[], None],
        on_beat: Callable[[redis_clients.Client], None],
        on_look: Callable[[redis_clients.Client, float], None],
    ) -> None:
        self._settings = settings
        self._deployment = deployment
        self._replica = replica
        self._entries = entries
        self._on_lost = on_lost
        self._on_tick = on_tick
        self._on_beat = on_beat
        self._on_look = on_look
        # After this long without a beat others may have taken over calls: the next beat asks which.
        self._gap_s = min(_LONGEST_GAP_S, settings.dead_after_s / 2)
        self.rests = self._serving = False
        self._held: list[bytes] = []
        self._ticked_at = 0.0
        self._arm_at = 0.0
        self._asked_at = 0.0
        self._stop = threading.Event()
        self._next_beat = threading.Event()
        self._thread = threading.Thread(target=self._run, name="qserve-heartbeat", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to beat; call on the loop."""
        self._loop = asyncio.get_running_loop()
        self._ticked_at = time.monotonic()
        self._thread.start()

    def serve(self) -> None:
        """From now on the beats say that calls are taken, and the loop is watched; call on the loop."""
        self._serving = True
        self._tick()
        self.beat_now()  # callers are told from now on that it has been seen

    def beat_now(self) -> None:
        """Do not wait for the next beat to be due."""
        self._next_beat.set()

    def stop(self) -> None:
        """End the thread; waits for a beat under way."""
        self._stop.set()
        self.beat_now()
        faulthandler.cancel_dump_traceback_later()
        if self._thread.is_alive():
            self._thread.join(timeout=_COMMAND_TIMEOUT_S + 1)

    def _tick(self) -> None:
        self._ticked_at = time.monotonic()
        self._held = self._entries()
        if self._serving and not self._stop.is_set() and self._ticked_at >= self._arm_at:
            # Each time is a thread for the C library to start: so now and then, and longer by as much.
            limit = self._settings.max_loop_stall_s
            self._arm_at = self._ticked_at + _ARM_AGAIN * limit
            faulthandler.dump_traceback_later((1 + _ARM_AGAIN) * limit, exit=True, file=_STDERR)
        self._on_tick()

    def _run(self) -> None:
        client = redis_clients.client(self._settings.redis_url, _COMMAND_TIMEOUT_S)
        beaten_at = time.monotonic()
        while True:
            started = time.monotonic()
            if started - self._ticked_at < self._settings.max_loop_stall_s:
                ask = self._held if started - beaten_at > self._gap_s else []
                if self._beat(client, ask):
                    beaten_at = time.monotonic()
            if self._serving:
                self._on_look(client, started - self._asked_at if self._ticked_at < self._asked_at else 0.0)
            if self._ticked_at >= self._asked_at:  # last, so that the two threads need not wait for each other
                self._asked_at = time.monotonic()
                self._on_loop(self._tick)
            self._next_beat.wait(until_next(REST_S) if self.rests else self._settings.beat_interval_s)
            self._next_beat.clear()
            if self._stop.is_set():
                break
        client.close()

    def _beat(self, client: redis_clients.Client, ask: list[bytes]) -> bool:
        reach("beat")
        try:
            keys = self._settings.keys
            lost = beat(client, keys, self._deployment, self._replica, ask, serving=self._serving)
            self._on_beat(client)
        except (QServeError, CommandRefused) as exc:
            logger.debug("a heartbeat failed: %s", exc)
            return False
        if lost:
            self._on_loop(lambda: self._on_lost(lost))
        return True

    def _on_loop(self, action: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:  # the loop has closed
            self._stop.set()
