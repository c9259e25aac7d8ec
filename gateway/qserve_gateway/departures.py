"""Noticing clients that leave while their call waits."""

import asyncio
from typing import Any

from starlette.types import Receive

TICK_S = 0.02

Waiting = asyncio.Future[Any]


class Departures:
    """Resolves the future of a waiting call with None when its client disconnects.

    Listening means a task per call (about 10 us, a sixth of what a request costs), so only calls that have waited for
    one to two ticks are listened to; a quick call costs an entry in a dict, and a client that left is noticed at once
    afterwards or within 40 ms.
    """

    def __init__(self) -> None:
        self._fresh: dict[Waiting, Receive] = {}
        self._older: dict[Waiting, Receive] = {}
        self._listeners: dict[Waiting, asyncio.Task[None]] = {}
        self._ticking = False

    def watch(self, future: Waiting, receive: Receive) -> None:
        """Starts to look after a call; the request's body must have been read."""
        self._fresh[future] = receive
        if not self._ticking:
            self._ticking = True
            future.get_loop().call_later(TICK_S, self._tick)

    def forget(self, future: Waiting) -> None:
        """Ends it; harmless for a call that was never watched."""
        if self._fresh.pop(future, None) is None and self._older.pop(future, None) is None:
            listener = self._listeners.pop(future, None)
            if listener is not None:
                listener.cancel()

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        for future, receive in self._older.items():
            self._listeners[future] = loop.create_task(_listen(future, receive))
        self._older, self._fresh = self._fresh, {}
        self._ticking = bool(self._older)
        if self._ticking:
            loop.call_later(TICK_S, self._tick)


async def _listen(future: Waiting, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    if not future.done():
        future.set_result(None)
