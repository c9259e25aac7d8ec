"""Two-way traffic of one call: numbered chunks with credit, so that a slow reader slows the writer.

Each side grants the other a window of bytes. A chunk that is missing, or that comes from another process than the
ones before it, breaks the channel: a stream is whole or visibly cut, never silently shortened.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable

import msgspec

from qserve.errors import QServeError, StreamBroken

HELLO, PART, DATA, END, CREDIT, ABORT = range(6)
"""What a chunk is: the first sign of a peer; part of a message, not its last; a message or its last part; the end;
permission for more; a reason to stop."""

LARGEST_PART = 128 * 1024
WINDOW = 1024 * 1024 + LARGEST_PART
"""Bytes on their way to one reader at most, so that a MiB never waits; also the price of memory per stream."""
_SMALLEST_COST = 1024
DOUBT_S = 6.0
"""For how long a process that seems dead may still show that it lives: longer than between two of its words."""
_GRANT_AFTER = WINDOW // 4


class Chunk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One message of a channel.

    Attributes:
        sender: Process id of who sent it, whose inbox gets what is sent back.
        kind: HELLO, PART, DATA, END, CREDIT or ABORT.
        number: For PART, DATA and END, its place in the stream from 0; for CREDIT, the cost allowed in total.
        data: A piece of the stream, or the reason of an ABORT.
    """

    sender: str
    kind: int
    number: int = 0
    data: bytes = b""


decode_chunk = msgspec.msgpack.Decoder(Chunk).decode


class Channel:
    """One side of a call's two-way traffic. Belongs to one event loop.

    Args:
        me: Id of this process.
        transmit: Sends a chunk to a process; called only once the peer is known.
        peer: Id of the other process, where it is known from the start.
    """

    def __init__(self, me: str, transmit: Callable[[str, Chunk], None], peer: str = "") -> None:
        self.peer = peer
        self._me = me
        self._transmit = transmit
        self._next_in = 0
        self._next_out = 0
        self._spent = 0
        self._allowed = WINDOW if peer else 0
        self._consumed = 0
        self._granted = WINDOW
        self._arrived: deque[tuple[int, bytes]] = deque()
        self._last_kind = DATA
        self._broken: QServeError | None = None
        self._is_finished = False
        self._doubted_at = 0.0
        self.is_unwanted = False
        """The peer has left, or has had enough."""
        self.on_data: Callable[[], None] | None = None
        """Called once, when the first of the stream arrives."""
        self.on_second_peer: Callable[[], None] | None = None
        """Called when another replica has taken the call over, and been turned away."""
        self._partial: list[bytes] = []
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._sending = asyncio.Lock()

    def peer_has_left(self, answer: object) -> bool:
        """Whether the other side is gone, by what Redis answered to a chunk (1: it lives).

        When the server's clock jumps everybody seems dead until they speak next; what is sent arrives all the same.
        """
        if answer == 1:
            self._doubted_at = 0.0
        elif answer == 0:
            self._doubted_at = self._doubted_at or time.monotonic()
        else:
            return True
        return answer == 0 and time.monotonic() - self._doubted_at > DOUBT_S

    def greet(self) -> None:
        """Tell the peer who it is talking to, so that it may send."""
        self._transmit(self.peer, Chunk(self._me, HELLO))

    # Sending

    async def send(self, data: bytes) -> None:
        """Send a message of any size; waits while the reader is behind. From several tasks, each message stays whole.

        Raises:
            StreamBroken: The peer is gone or has had enough.
        """
        async with self._sending:
            start = 0
            try:
                while len(data) - start > LARGEST_PART:
                    await self._send_part(PART, data[start : start + LARGEST_PART])
                    start += LARGEST_PART
                await self._send_part(DATA, data[start:] if start else data)
            except asyncio.CancelledError:
                if start:  # what follows would be taken for the rest of it
                    self.abort("a message was cut short")
                raise

    async def _send_part(self, kind: int, data: bytes) -> None:
        cost = max(len(data), _SMALLEST_COST)
        while self._spent + cost > self._allowed and self._broken is None:
            self._writable.clear()
            await self._writable.wait()
        if self._broken is not None:
            raise self._error()
        self._spent += cost
        self._emit(kind, data)

    @property
    def sent(self) -> int:
        """How many parts have been sent, which the final reply tells so that none is missed."""
        return self._next_out

    @property
    def is_broken(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._broken is not None

    async def end(self) -> None:
        """Say that nothing more will be sent.

        Raises:
            StreamBroken: The peer is gone.
        """
        while not self.peer and self._broken is None:
            self._writable.clear()
            await self._writable.wait()
        if self._broken is not None:
            raise self._error()
        self._emit(END, b"")

    def _emit(self, kind: int, data: bytes) -> None:
        self._transmit(self.peer, Chunk(self._me, kind, self._next_out, data))
        self._next_out += 1

    # Receiving

    async def receive(self) -> bytes | None:
        """The next message as it was sent, None at the end of the stream; raises like `receive_part`.

        Whoever gives up waiting misses nothing: the next call continues.
        """
        while True:
            data = await self.receive_part()
            if data is None:
                return None
            if self._last_kind == DATA and not self._partial:
                return data
            self._partial.append(data)
            if self._last_kind == DATA:
                parts, self._partial = self._partial, []
                return b"".join(parts)

    @property
    def peer_has_ended(self) -> bool:
        """Whether the end of the stream has arrived, read or not."""
        return bool(self._arrived) and self._arrived[-1][0] == END

    async def wait_broken(self) -> None:
        """Wait until the peer leaves, whatever else it sends."""
        while self._broken is None:
            self._readable.clear()
            await self._readable.wait()

    async def receive_part(self) -> bytes | None:
        """The next part of the stream, wherever its messages begin and end; None at the end of the stream.

        Raises:
            StreamBroken: The rest will never come.
        """
        while not self._arrived:
            if self._broken is not None:
                raise self._error()
            self._readable.clear()
            await self._readable.wait()
        self._last_kind, data = self._arrived[0]
        if self._last_kind == END:
            return None  # stays: whoever asks again hears the same
        self._arrived.popleft()
        self._consumed += max(len(data), _SMALLEST_COST)
        if self._consumed + WINDOW - self._granted >= _GRANT_AFTER and self.peer and self._is_open:
            self._granted = self._consumed + WINDOW
            self._transmit(self.peer, Chunk(self._me, CREDIT, self._granted))
        return data

    @property
    def _is_open(self) -> bool:
        return self._broken is None and not self._is_finished

    def _error(self) -> StreamBroken:
        # A new one each time: an error that is kept keeps all frames it has passed, the generator that sends included.
        # Whatever ended the call: here it is a stream that broke, and the call's outcome says why.
        kind = type(self._broken) if isinstance(self._broken, StreamBroken) else StreamBroken
        return kind(str(self._broken))

    # What arrives

    def feed(self, chunk: Chunk) -> None:
        """Take in a chunk from the inbox."""
        if self._broken is not None:
            if chunk.kind == HELLO:
                self._turn_away(chunk.sender)
            return
        if not self.peer:
            self.peer = chunk.sender
            self._allowed = WINDOW
            self._writable.set()
        elif chunk.sender != self.peer:
            self.close(StreamBroken("the replica that streamed has died: call again for all of it"))
            self._turn_away(chunk.sender)
            return
        if chunk.kind == CREDIT:
            self._allowed = max(self._allowed, chunk.number)
            self._writable.set()
        elif chunk.kind == ABORT:
            self.is_unwanted = True
            self.close(StreamBroken(chunk.data.decode("utf-8", "replace")))
        elif chunk.kind != HELLO:
            self._take_in(chunk)

    def _turn_away(self, sender: str) -> None:
        # A replica that has taken the call over would wait for a stream whose beginning is gone.
        self._transmit(sender, Chunk(self._me, ABORT, 0, str(self._broken).encode()))
        if self.on_second_peer is not None and sender != self.peer:
            self.on_second_peer()

    def _take_in(self, chunk: Chunk) -> None:
        if chunk.number != self._next_in:
            self.abort(f"part {self._next_in} of the stream was lost on its way: call again for all of it")
            return
        self._next_in += 1
        self._arrived.append((chunk.kind, chunk.data))
        self._readable.set()
        if self.on_data is not None:
            on_data, self.on_data = self.on_data, None
            on_data()

    def finish(self, parts: int) -> None:
        """The peer's final reply has come: nothing arrives after it.

        Args:
            parts: How many it has sent; the last ones may be lost with a connection, although the reply is not.
        """
        self._is_finished = True
        self.on_data = None  # it refers to this object, and the collector comes seldom
        if self._next_in != parts:
            self.close(StreamBroken("the end of the stream was lost on its way: call again for all of it"))
        elif not self.peer_has_ended:
            self._arrived.append((END, b""))
            self._readable.set()

    def abort(self, reason: str | StreamBroken) -> None:
        """Break the channel on both sides; this one may raise an error of its own."""
        error = StreamBroken(reason) if isinstance(reason, str) else reason
        if self.peer and self._is_open:
            self._transmit(self.peer, Chunk(self._me, ABORT, 0, str(error).encode()))
        self.close(error)

    def close(self, error: QServeError) -> None:
        """Break the channel on this side: what has arrived can still be read, then `error` is raised."""
        self.on_data = None
        if self._broken is None:
            self._broken = error
            self._readable.set()
            self._writable.set()
