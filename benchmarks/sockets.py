"""WebSocket load: many clients, each of which waits for its echo before it sends the next message."""

import asyncio
import statistics
import time
from urllib.parse import urlsplit

from qserve.calls.process_client import new_event_loop

_MASKED_ECHO = b"\x81\x84\0\0\0\0echo"
_ECHO = b"\x81\x04echo"
_HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nhost: {netloc}\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    "sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


class Echoes:
    """The figures of one run."""

    def __init__(self, times_ms: list[float], seconds: float) -> None:
        self.messages_per_s = len(times_ms) / seconds
        self.p99_ms = statistics.quantiles(times_ms, n=100)[98]


def drive(url: str, clients: int, seconds: float) -> Echoes:
    """Connect all clients, then let each send message after message for some seconds."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_drive(url, clients, seconds))


async def _drive(url: str, clients: int, seconds: float) -> Echoes:
    parts = urlsplit(url)
    handshake = _HANDSHAKE.format(path=parts.path, netloc=parts.netloc).encode()
    connections = []
    for _ in range(clients):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(handshake)
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 101 " not in head:
            raise SystemExit(f"no WebSocket: {head!r}")
        connections.append((reader, writer))
    times_ms: list[float] = []
    end = time.perf_counter() + seconds

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (began := time.perf_counter()) < end:
            writer.write(_MASKED_ECHO)
            if await reader.readexactly(len(_ECHO)) != _ECHO:
                raise SystemExit("an echo of something else")
            times_ms.append((time.perf_counter() - began) * 1000)
        writer.close()

    await asyncio.gather(*(talk(*each) for each in connections))
    return Echoes(times_ms, seconds)
