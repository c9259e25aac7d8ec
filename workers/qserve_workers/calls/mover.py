"""Puts calls on the queue when their time has come: delayed ones, retries, and those of low priority."""

import asyncio
import logging

from qserve.background import end, spawn
from qserve.broker.link import Link
from qserve.broker.records import Records
from qserve.errors import QServeError
from qserve.failpoints import reach
from qserve.settings import Settings

logger = logging.getLogger(__name__)

_LOOK_EVERY_S, _HOLDER_LOOKS_EVERY_S = 1.0, 0.25


class Mover:
    """Looks for calls that are due. Every replica has one; the one with the lease looks four times a second, the others
    ask for the lease.
    """

    def __init__(self, settings: Settings, deployment: str, replica: str, link: Link) -> None:
        self._deployment = deployment
        self._replica = replica
        self._link = link
        self._records = Records(settings.keys)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look, if it has not begun."""
        self._task = self._task or spawn(self._watch())

    async def stop(self) -> None:
        """Look no more."""
        await end(self._task)

    def look_in(self, seconds: float) -> None:
        """Look once at that time, whoever has the lease: this replica knows of a call that is due then."""
        asyncio.get_running_loop().call_later(seconds + 0.002, lambda: spawn(self._look_once()))

    async def _watch(self) -> None:
        while True:
            pause = await self._look(anyway=False)
            await asyncio.sleep(pause)

    async def _look_once(self) -> None:
        await self._look(anyway=True)

    async def _look(self, *, anyway: bool) -> float:
        sender = self._link.sender
        if not sender.is_open:
            return _LOOK_EVERY_S
        reach("due")
        try:
            ours, moved, next_ms, low = await self._records.move_due(
                sender, self._deployment, self._replica, anyway=anyway
            )
        except QServeError:
            return _LOOK_EVERY_S
        except Exception:
            logger.exception("putting due calls on the queue of %s failed", self._deployment)
            return _LOOK_EVERY_S
        if moved:
            reach("moved")
        if ours != b"1":
            return _LOOK_EVERY_S
        if moved and (low or next_ms == 0):
            return 0.01
        pause = _HOLDER_LOOKS_EVERY_S if not low else 0.02
        return pause if next_ms < 0 else min(pause, next_ms / 1000 + 0.002)
