"""A proxy before a server that does to its connections what networks do: lose, hold, delay, cut.

Whoever gets its `url` instead of the server's is behind a bad line: one worker, one gateway, or everybody.
"""

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any

from qserve.broker.server.address import parse
from tests.support.slowness import patience

_SEGMENT = 64 * 1024
_RESET = struct.pack("ii", 1, 0)  # lingering for 0 seconds: the peer gets RST, as from a host that has restarted
_ON_THE_LINE = 64
_Look = Callable[[bytes], None]


class Way(Enum):
    """What becomes of the bytes in one direction."""

    PASS = "passed on"
    DROP = "lost for good: such a connection is reset when the line heals"
    HOLD = "kept until the line heals, as TCP does over a partition: no error, no RST, nothing"


class FaultyLink:
    """A TCP proxy on a thread of its own, harmless until it is told otherwise. All methods are thread-safe.

    Args:
        url: Of the server, over TCP or a unix socket, without TLS.
        seed: Of the connections it chooses to reset.
    """

    def __init__(self, url: str, seed: int = 0) -> None:
        self._server = parse(url)
        self._dice = random.Random(seed)
        self._pairs: set[_Pair] = set()
        self._watched: list[tuple[bytes, Callable[[], None]]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-link", daemon=True)
        self.requests = self.replies = Way.PASS
        self.delay_s = 0.0
        """How long every segment takes, in each direction."""
        self.reset_share = 0.0
        """How many of the segments end their connection instead of arriving."""
        self.resets = 0
        self.connections = 0

    def start(self) -> None:
        """Listen on a free port of 127.0.0.1."""
        self._thread.start()
        self._listener = self._run(asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_SEGMENT))
        self.port: int = self._listener.sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Reset every connection and listen no more."""
        self._listener.close()
        self.cut()
        self._run(_one_more_tick())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> "FaultyLink":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The server's URL by way of this proxy."""
        user = f"{self._server.username}:{self._server.password}@" if self._server.password else ""
        return f"redis://{user}127.0.0.1:{self.port}/{self._server.db}"

    def lose_replies(self) -> None:
        """What is sent is carried out, but nobody learns of it."""
        self.replies = Way.DROP

    def lose_requests(self) -> None:
        """What is sent never arrives; answers that are on their way do."""
        self.requests = Way.DROP

    def part(self) -> None:
        """Half-open: connections are accepted and stay open, nothing moves in either direction."""
        self.requests = self.replies = Way.HOLD

    def forget(self) -> None:
        """Every connection that there is now stays open and carries nothing any more, for good, as where a host has
        vanished or a firewall has forgotten them. New ones are harmless."""
        self._each(_Pair.forget)

    def heal(self) -> None:
        """Pass everything on again; what was held arrives now, connections that have lost bytes are reset."""
        self.requests = self.replies = Way.PASS
        self.delay_s = self.reset_share = 0.0
        self._each(_Pair.heal)

    def cut(self) -> None:
        """Reset every connection there is now; new ones are accepted."""
        self._each(_Pair.reset)

    def when_sent(self, text: bytes, do: Callable[[], None]) -> None:
        """Do something, once, just before a request that contains `text` is looked at: `lose_replies`, for example.

        Args:
            do: Called on the thread of the proxy; must not wait for anything.
        """
        self._watched.append((text, do))

    # On the loop of the proxy

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._server.path:
                server = await asyncio.open_unix_connection(self._server.path, limit=_SEGMENT)
            else:
                server = await asyncio.open_connection(self._server.host, self._server.port, limit=_SEGMENT)
        except OSError:
            writer.transport.abort()
            return
        self.connections += 1
        pair = _Pair(self, writer.transport, server[1].transport)
        self._pairs.add(pair)
        try:
            await asyncio.gather(
                pair.carry(reader, server[1], lambda: self.requests, self._look),
                pair.carry(server[0], writer, lambda: self.replies, lambda _: None),
            )
        finally:
            self._pairs.discard(pair)
            pair.reset()

    def _look(self, request: bytes) -> None:
        for each in [each for each in self._watched if each[0] in request]:
            self._watched.remove(each)
            each[1]()

    def hits(self) -> bool:
        """Whether this segment is one of those that end their connection."""
        if hit := self.reset_share > 0 and self._dice.random() < self.reset_share:
            self.resets += 1
        return hit

    def _each(self, do: Callable[["_Pair"], None]) -> None:
        async def all_of_them() -> None:
            for pair in list(self._pairs):
                do(pair)

        if threading.current_thread() is self._thread:
            self._loop.create_task(all_of_them())
        else:
            self._run(all_of_them())

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(patience(10))


class _Pair:
    """A connection of a client, and the one to the server that belongs to it."""

    def __init__(self, link: FaultyLink, client: asyncio.WriteTransport, server: asyncio.WriteTransport) -> None:
        self._link = link
        self._ends = client, server
        self._changed = asyncio.Event()
        self._has_lost_bytes = False
        self._is_forgotten = False
        self._is_closed = False

    async def carry(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, way: Callable[[], Way], look: _Look
    ) -> None:
        """Move bytes in one direction until one of the ends is closed; nobody learns of that through a bad line."""
        on_the_line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_ON_THE_LINE)
        reading = asyncio.create_task(self._read(source, on_the_line))
        try:
            while not self._is_closed:
                arrives_at, data = await on_the_line.get()
                look(data)
                await asyncio.sleep(arrives_at - asyncio.get_running_loop().time())
                kept = (Way.HOLD,) if data else (Way.HOLD, Way.DROP)
                while (way() in kept or self._is_forgotten) and not self._is_closed:
                    self._changed.clear()
                    await self._changed.wait()
                if way() is Way.DROP:
                    self._has_lost_bytes = True
                elif not data or self._link.hits():
                    break
                else:
                    target.write(data)
                    await target.drain()
        except OSError:
            pass
        finally:
            self.reset()
            reading.cancel()

    async def _read(self, source: asyncio.StreamReader, on_the_line: "asyncio.Queue[tuple[float, bytes]]") -> None:
        data = b"?"
        while data:
            try:
                data = await source.read(_SEGMENT)
            except OSError:
                data = b""
            await on_the_line.put((asyncio.get_running_loop().time() + self._link.delay_s, data))

    def forget(self) -> None:
        """Carry nothing any more."""
        self._is_forgotten = True

    def heal(self) -> None:
        """The line is good again."""
        self._changed.set()
        if self._has_lost_bytes:
            self.reset()

    def reset(self) -> None:
        """End both connections with RST."""
        self._is_closed = True
        self._changed.set()
        for end in self._ends:
            sock = end.get_extra_info("socket")
            if not end.is_closing() and sock is not None and sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            end.abort()


async def _one_more_tick() -> None:
    await asyncio.sleep(0.01)
