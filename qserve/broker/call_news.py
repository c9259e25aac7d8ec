"""News of durable calls: whoever follows a call is woken when there is something new in its record."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from redis.exceptions import RedisError

from qserve.background import end, spawn
from qserve.broker.instance.change_log import connect_asyncio
from qserve.broker.keys import Keys

logger = logging.getLogger(__name__)

_PAUSE_S = 0.5


class CallNews:
    """Wakes those who follow a call; one connection to Redis, made for the first of them.

    Redis announces that there is something new, not what: that stands in the record, numbered, so nothing is lost.
    """

    def __init__(self, redis_url: str, keys: Keys) -> None:
        self._url = redis_url
        self._keys = keys
        self._followers: dict[str, set[asyncio.Event]] = {}
        self._changed = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def of(self, call_id: str) -> AsyncIterator[asyncio.Event]:
        """An event that is set whenever there is news of a call."""
        channel, woken = self._keys.call(call_id), asyncio.Event()
        self._followers.setdefault(channel, set()).add(woken)
        self._changed.set()
        if self._reader is None:
            self._reader = spawn(self._read())
        try:
            yield woken
        finally:
            self._followers[channel].discard(woken)
            if not self._followers[channel]:
                del self._followers[channel]
            self._changed.set()

    async def stop(self) -> None:
        """Wake nobody any more, and close the connection."""
        await end(self._reader)

    async def _read(self) -> None:
        while True:
            try:
                await self._read_until_lost()
            except RedisError as exc:
                logger.debug("no news of calls for now: %s", exc)
                await asyncio.sleep(_PAUSE_S)

    async def _read_until_lost(self) -> None:
        async with connect_asyncio(self._url) as client, client.pubsub() as pubsub:
            known: set[str] = set()
            while True:
                wanted = set(self._followers)
                if new := wanted - known:
                    await pubsub.subscribe(*new)
                    self._wake(*new)  # what happened before the subscription
                if old := known - wanted:
                    await pubsub.unsubscribe(*old)
                known = wanted
                self._changed.clear()
                if not known:
                    await self._changed.wait()
                    continue
                message: Any = await pubsub.get_message(ignore_subscribe_messages=True, timeout=0.1)
                if message is not None:
                    self._wake(message["channel"].decode())

    def _wake(self, *channels: str) -> None:
        for channel in channels:
            for woken in self._followers.get(channel, ()):
                woken.set()
