"""What is asked about a durable call, from any thread or event loop: its record, and the parts of its result."""

import asyncio
import concurrent.futures
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from qserve.calls.client import Client
from qserve.errors import BrokerUnavailable, CallNotFound, StreamBroken
from qserve.wire.call_record import ENDS, CallRecord, Part
from qserve.wire.codec import Codec

Found = TypeVar("Found")
_LOOK_AGAIN_S = 10.0
"""How often to look for parts without having been told of one, since news may be lost with a connection."""


class Inquiries:
    """Asks about one durable call. Who gives up waiting for an answer ends the asking, too.

    Attributes:
        news: Who waits on the loop of the client for another part.
    """

    def __init__(self, client: Client, codec: Codec, call_id: str) -> None:
        self.news: set[asyncio.Event] = set()
        self._client = client
        self._codec = codec
        self._id = call_id

    # From any thread

    def wait_for(self, asking: Coroutine[Any, Any, Found], instead: str) -> Found:
        """Ask on the loop of the client, and wait for the answer.

        Args:
            instead: What code on that loop has to use, where waiting would stop it.
        """
        if self._client.is_own_thread():
            asking.close()
            raise RuntimeError(f"this would block the event loop that receives the answer: use {instead}")
        begun = self._begin(asking)
        try:
            return begun.result()
        finally:
            begun.cancel()  # where waiting was interrupted
            del begun  # else the traceback of an error would hold what holds the error

    async def wait_async(self, asking: Coroutine[Any, Any, Found]) -> Found:
        """The same for asynchronous code, on whatever loop."""
        if self._client.is_own_thread():
            return await asking
        return await asyncio.wrap_future(self._begin(asking))

    def _begin(self, asking: Coroutine[Any, Any, Found]) -> "concurrent.futures.Future[Found]":
        try:
            return asyncio.run_coroutine_threadsafe(asking, self._client.loop)
        except RuntimeError:  # the loop has closed
            asking.close()
            raise BrokerUnavailable(
                f"the ref of call {self._id} belongs to a client that was stopped, as by serve.shutdown(): where the "
                "instance runs, serve.get_ref() takes the call up again"
            ) from None

    # On the loop of the client

    async def describe(self) -> CallRecord:
        """The record of the call.

        Raises:
            CallNotFound: There is none, or none any more.
            BrokerUnavailable: Redis cannot be asked.
        """
        record = await self._client.durable.by_id.describe(self._id)
        if record is None:
            raise CallNotFound(f"there is no durable call {self._id!r}, or its record has expired")
        return record

    def part_reader(self) -> "PartReader":
        """Reads the parts from the first one on."""
        return PartReader(self._client, self)

    async def read(self, reader: "PartReader") -> list[Any] | None:
        """What the call yields next, once there is something; None once it has ended."""
        woken = asyncio.Event()
        self.news.add(woken)
        try:
            while True:
                woken.clear()
                parts, is_over = await reader.read()
                if parts:
                    return [self._codec.unpack(part.data) if part.packed else part.data for part in parts]
                if is_over:
                    return None
                with suppress(TimeoutError):
                    await asyncio.wait_for(woken.wait(), _LOOK_AGAIN_S)
        finally:
            self.news.discard(woken)

    def wake(self) -> None:
        """Let all who read the parts look again."""
        for woken in self.news:
            woken.set()


class PartReader:
    """Reads the parts of one attempt of a call, a page at a time. Belongs to the client's loop."""

    def __init__(self, client: Client, inquiries: Inquiries) -> None:
        self._client = client
        self._inquiries = inquiries
        self._attempt = self._after = self._count = 0

    async def read(self) -> tuple[list[Part], bool]:
        """Return the parts that follow those read before, and whether the call has ended."""
        record = await self._inquiries.describe()
        if self._count and record.attempts != self._attempt:
            raise StreamBroken(
                f"attempt {self._attempt} of call {record.id} ended after {self._count} parts were read; attempt "
                f"{record.attempts} yields them again: iterate again"
            )
        self._attempt = record.attempts
        found = await self._client.durable.by_id.parts(record, self._after)
        for number, _, part in found:
            self._count += 1
            if part.index != self._count:
                raise StreamBroken(f"part {self._count} of attempt {self._attempt} of call {record.id} is missing")
            self._after = number
        return [part for _, _, part in found], record.state in ENDS
