"""When a replica may do every few seconds what it does every second: while it is alone and nobody calls."""

import asyncio
from collections.abc import Callable

from qserve.broker.link import REST_S
from qserve.calls.client import Client
from qserve.settings import Settings
from qserve_workers.calls.consumer import Consumer
from qserve_workers.replica.heartbeat import Heartbeat

_BEAT_SOON_S = 0.05
"""How long after a call has ended the rest a heartbeat says what runs: not while the call begins."""


class Rest:
    """The rest of one replica. Belongs to its event loop.

    A replica with others beside it never rests: they would notice its death, and it theirs, so much later.

    Args:
        may_rest: Whether it serves, and nothing but calls needs it.
    """

    def __init__(
        self,
        settings: Settings,
        client: Client,
        consumer: Consumer,
        heartbeat: Heartbeat,
        may_rest: Callable[[], bool],
    ) -> None:
        self._client = client
        self._consumer = consumer
        self._heartbeat = heartbeat
        self._may_rest = may_rest
        # A heartbeat that is a little late must not count as a death, nor a rest as a standstill.
        enough = settings.dead_after_s >= REST_S + 2 * settings.beat_interval_s
        self._is_possible = enough and settings.max_loop_stall_s >= 3 * REST_S
        self._handled = -1
        consumer.on_first_call = self._end

    def look(self) -> None:
        """Begin to rest if nothing was called since the last look, or rest no more; to be called every second."""
        handled, before = self._consumer.slots.handled, self._handled
        self._handled = handled
        is_idle = handled == before and not self._consumer.entries and not self._client.pending
        self._set(self._is_possible and is_idle and self._may_rest())

    def _end(self) -> None:
        self._set(False)
        asyncio.get_running_loop().call_later(_BEAT_SOON_S, self._heartbeat.beat_now)

    def _set(self, rests: bool) -> None:
        self._heartbeat.rests = self._consumer.link.rests = rests
        for each in self._client.all():
            each.link.rests = rests
