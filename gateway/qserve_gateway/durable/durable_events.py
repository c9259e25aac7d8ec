"""The events of a durable call as they happen, as server-sent events."""

import asyncio
import base64
import contextlib
import logging
from typing import Any

import msgspec
from starlette.types import Receive, Send

from qserve.background import end, spawn
from qserve.broker.call_news import CallNews
from qserve.durable.by_id import PARTS_READ
from qserve.durable.durable_client import DurableCalls
from qserve.errors import BrokerUnavailable, FrameRejected, QServeError
from qserve.wire.call_record import ENDS, CallEvent, CallRecord, Part
from qserve.wire.messages import HttpResponse
from qserve_gateway.durable.json_values import plain_value
from qserve_gateway.respond import start_message

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 10.0
"""Seconds between two looks without news, which may get lost with a connection; each also finds clients that left."""


class EventStream:
    """A response with the events of one call, which goes on until the call has ended.

    Args:
        leaving: Set when the gateway leaves: the client reads on at another one.
        after: The number of the last event that the client has.
    """

    def __init__(self, durable: DurableCalls, news: CallNews, leaving: asyncio.Event, call_id: str, after: int) -> None:
        self._durable = durable
        self._news = news
        self._leaving = leaving
        self._call_id = call_id
        self._after = after
        self._left = asyncio.Event()

    async def write(self, send: Send, receive: Receive, method: str, request_id: str) -> None:
        """Write events until there are no more, or the client or this gateway leaves."""
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
                record = await self._durable.by_id.describe(self._call_id, self._after)
                if record is not None:
                    news, is_all = await self._news_of(record)
                    text += b"".join(news)
                is_over = is_all and (record is None or record.state in ENDS)
            await send({"type": "http.response.body", "body": text, "more_body": True})
            if is_over or self._leaving.is_set():
                return
            if is_all:
                await self._wait(woken)

    async def _news_of(self, record: CallRecord) -> tuple[list[bytes], bool]:
        """The next events and parts in their order, and whether these are all that there are now."""
        try:
            parts = await self._durable.by_id.parts(record, self._after)
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
        waits = [asyncio.ensure_future(event.wait()) for event in (woken, self._left, self._leaving)]
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
                data["progress"] = plain_value(self._durable.by_id.open(event.data, self._call_id).payload)
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
