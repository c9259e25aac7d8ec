"""Puts calls on the queue when their time has come: delayed ones, retries, and those of low priority."""

import asyncio
import logging

from qserve.background import end, spawn, until_next
from qserve.broker.link import REST_S, Link
from qserve.broker.records import Records
from qserve.errors import QServeError
from qserve.failpoints import reach
from qserve.settings import Settings

logger = logging.getLogger(__name__)

_LOOK_EVERY_S, _LEASE_S = 1.0, 3.0
_SOON_S = 0.02
"""How often to look while calls of low priority wait for the queue to be empty."""


class Mover:
    """Looks for calls that are due. Every replica has one, of which one has the lease and the others ask for it.

    Whoever has it looks when the next call is due that it knows of, and is woken when one is submitted before that.
    """

    def __init__(self, settings: Settings, deployment: str, replica: str, link: Link) -> None:
        self._deployment = deployment
        self._replica = replica
        self._link = link
        self._records = Records(settings.keys)
        self._woken = asyncio.Event()
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

    def wake(self) -> None:
        """Look now, or once more when the look under way is over."""
        self._woken.set()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._woken.clear()
            timer = loop.call_later(await self._look(anyway=False), self._woken.set)
            await self._woken.wait()
            timer.cancel()

    @property
    def _pause_s(self) -> float:
        return self._link.pause_s if self._link.rests else until_next(_LOOK_EVERY_S)

    async def _look_once(self) -> None:
        await self._look(anyway=True)

    async def _look(self, *, anyway: bool) -> float:
        sender = self._link.sender
        if not sender.is_open:
            return self._pause_s
        reach("due")
        try:
            ours, moved, next_ms, low = await self._records.move_due(
                sender, self._deployment, self._replica, lease_s=_LEASE_S + 2 * REST_S * self._link.rests, anyway=anyway
            )
        except QServeError:
            return _LOOK_EVERY_S
        except Exception:
            logger.exception("putting due calls on the queue of %s failed", self._deployment)
            return _LOOK_EVERY_S
        if moved:
            reach("moved")
        if ours != b"1":
            return self._pause_s
        if moved and (low or next_ms == 0):
            return 0.01
        pause = _SOON_S if low else self._pause_s
        return pause if next_ms < 0 else min(pause, next_ms / 1000 + 0.002)
