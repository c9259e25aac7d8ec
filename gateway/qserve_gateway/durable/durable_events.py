"""News of durable calls as they happen, for clients that follow one: server-sent events."""

import asyncio
import base64
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import redis
from starlette.types import Receive, Send

from qserve.background import end, spawn
from qserve.broker.following import connect_asyncio
from qserve.broker.keys import Keys
from qserve.durable.submitting import PARTS_READ, DurableCalls
from qserve.errors import BrokerUnavailable, FrameRejected, QServeError
from qserve.wire.call_record import ENDS, CallEvent, CallRecord, Part
from qserve.wire.messages import HttpResponse
from qserve_gateway.durable.json_values import plain_value
from qserve_gateway.respond import start_message

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 10.0
"""News may get lost with a connection; and a comment sent now and then shows which clients have left."""
_PAUSE_S = 0.5


class News:
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
        """Wake nobody any more."""
        await end(self._reader)

    async def _read(self) -> None:
        while True:
            try:
                await self._read_until_lost()
            except redis.RedisError as exc:
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


class EventStream:
    """The events of one call as a response that goes on until the call has ended.

    Args:
        after: Number of the last event that the client has.
    """

    def __init__(self, durable: DurableCalls, news: News, call_id: str, after: int) -> None:
        self._durable = durable
        self._news = news
        self._call_id = call_id
        self._after = after
        self._left = asyncio.Event()

    async def write(self, send: Send, receive: Receive, method: str, request_id: str) -> None:
        """Write events until there are no more, or the client leaves."""
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
        await send(start_message(HttpResponse(200, headers, b""), method, request_id, streamed=True))
        listener = spawn(self._listen(receive))
        try:
            async with self._news.of(self._call_id) as woken:
                if method != "HEAD":
                    await self._write_events(send, woken)
        finally:
            await end(listener)
        if not self._left.is_set():
            await send({"type": "http.response.body", "body": b""})

    async def _write_events(self, send: Send, woken: asyncio.Event) -> None:
        while not self._left.is_set():
            woken.clear()
            text, is_over, is_all = b": \n\n", False, True
            with contextlib.suppress(BrokerUnavailable):
                record = await self._durable.describe(self._call_id, self._after)
                if record is not None:
                    news, is_all = await self._news_of(record)
                    text += b"".join(news)
                is_over = is_all and (record is None or record.state in ENDS)
            await send({"type": "http.response.body", "body": text, "more_body": True})
            if is_over:
                return
            if is_all:
                await self._wait(woken)

    async def _news_of(self, record: CallRecord) -> tuple[list[bytes], bool]:
        """Events and parts in their order, as far as they are at hand, and whether that is all."""
        try:
            parts = await self._durable.parts(record, self._after)
        except FrameRejected as exc:
            logger.warning("left out parts of call %s: %s", record.id, exc)
            parts = []
        is_all = len(parts) < PARTS_READ
        last = record.last_number if is_all else parts[-1][0]
        news = {event.number: self._text(event) for event in record.events if event.number <= last}
        news |= {number: _part_text(number, at, part) for number, at, part in parts}
        self._after = max(self._after, last)
        return [news[number] for number in sorted(news)], is_all

    async def _wait(self, woken: asyncio.Event) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in (woken, self._left)]
        try:
            await asyncio.wait(waits, timeout=_LOOK_AGAIN_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._left.set()

    def _text(self, event: CallEvent) -> bytes:
        data: dict[str, Any] = {"at": event.at}
        if event.name == "started":
            data["attempt"] = int(event.data)
        elif event.name == "progress":
            with contextlib.suppress(QServeError, FrameRejected, msgspec.DecodeError):
                data["progress"] = plain_value(self._durable.open(event.data, self._call_id).payload)
        elif event.data:
            data["error"] = event.data.decode("utf-8", "replace")
        name = event.name
        if name in ENDS:
            data["state"], name = name, "done"
        return b"id: %d\nevent: %b\ndata: %b\n\n" % (event.number, name.encode(), msgspec.json.encode(data))


def _part_text(number: int, at: float, part: Part) -> bytes:
    data: dict[str, Any] = {"at": at, "attempt": part.attempt, "number": part.index}
    if part.packed:
        with contextlib.suppress(QServeError, msgspec.DecodeError):
            data["chunk"] = plain_value(part.data)
    else:
        try:
            data["chunk"] = part.data.decode()
        except UnicodeDecodeError:
            data["chunk_base64"] = base64.b64encode(part.data).decode()
    return b"id: %d\nevent: chunk\ndata: %b\n\n" % (number, msgspec.json.encode(data))
