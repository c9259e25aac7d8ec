"""A replica that stood still for so long that others may have taken its calls, or its place (a frozen host, say)."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable

from qserve.background import spawn
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.replica_queue import Entry
from qserve.errors import BrokerUnavailable

logger = logging.getLogger(__name__)

_NEXT_TRY_S = 0.2


class Absence:
    """Holds back the calls that came meanwhile until it is known that they may start. Belongs to one event loop.

    Args:
        after_s: A longer standstill is an absence.
        is_mine: Whether nobody has taken over a call.
        begin: Gets the calls that are still this replica's.
        may_go_on: Whether this replica may take calls at all; one that may not leaves what it holds to others.
    """

    def __init__(
        self,
        after_s: float,
        is_mine: Callable[[Entry], Awaitable[bool]],
        begin: Callable[[list[Entry]], None],
        may_go_on: Callable[[], Awaitable[bool]],
    ) -> None:
        self._may_go_on = may_go_on
        self._after_s = after_s
        self._is_mine = is_mine
        self._begin = begin
        self._seen_at = time.monotonic()
        self._held: list[Entry] | None = None

    def noticed(self) -> bool:
        """Whether there was one that is not dealt with yet; to be asked before calls are taken, and every second."""
        now = time.monotonic()
        if self._held is None and now - self._seen_at > self._after_s:
            logger.warning("This replica stood still for %.0f s", now - self._seen_at)
            self._held = []
            spawn(self._come_back())
        self._seen_at = now
        return self._held is not None

    def hold(self, entries: Iterable[Entry]) -> None:
        """Keep calls until it is dealt with."""
        if self._held is not None:
            self._held += entries

    async def _come_back(self) -> None:
        while self._held is not None:
            held = list(self._held)
            try:
                if not await self._may_go_on():
                    return
                mine = [entry for entry in held if await self._is_mine(entry)]
            except (BrokerUnavailable, CommandRefused) as exc:
                logger.debug("cannot ask what became of the calls: %s", exc)
                await asyncio.sleep(_NEXT_TRY_S)
                continue
            if len(self._held) == len(held):  # else more have come meanwhile
                self._held = None
                self._begin(mine)
