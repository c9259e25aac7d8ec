"""A transport that needs one write for each response."""

import asyncio
from collections.abc import Callable
from typing import Any

WRITTEN_AT_ONCE = 64 * 1024
"""Bytes of a piece that is not held, nor copied to be one with others."""


class TickTransport(asyncio.Transport):
    """Writes in a single system call what was written during one tick of the event loop.

    uvicorn writes head and body of a response one after the other and uvloop passes each on at once: two system calls
    and two packets per response, a sixth of the gateway's processor time.

    Args:
        transport: The real one.
        loop: Its event loop.

    Attributes:
        head: The first piece written of the current response; None before.
        sent: Bytes of the current response.
        close_gently: Called in place of closing, None to close at once.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._held: list[bytes | bytearray | memoryview[int]] = []
        self.head: bytes | bytearray | memoryview[int] | None = None
        self.sent = 0
        self.close_gently: Callable[[], None] | None = None

    def write(self, data: "bytes | bytearray | memoryview[int]") -> None:
        """Hold the data until the end of this tick; with a large piece all is written at once."""
        size = len(data)
        self.sent += size
        if self.head is None and data[9:10] != b"1":  # "HTTP/1.1 100 Continue" is no response yet
            self.head = data
        if size >= WRITTEN_AT_ONCE:
            held, self._held = self._held, []
            self._transport.writelines([*held, data])
            return
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)

    def write_whole(self, response: bytes) -> None:
        """Write a response that is complete, so that there is nothing to hold it for."""
        if self._held:  # what was written before comes first
            self.write(response)
            return
        self.head = response
        self.sent += len(response)
        self._transport.write(response)

    def _flush(self) -> None:
        if self._held:
            data = self._held[0] if len(self._held) == 1 else b"".join(self._held)
            self._held = []
            self._transport.write(data)

    def close(self) -> None:
        """Close once everything is written."""
        self._flush()
        if self.close_gently is not None:
            self.close_gently()
        else:
            self._transport.close()

    def abort(self) -> None:
        """Close without writing."""
        self._held.clear()
        self._transport.abort()

    def is_closing(self) -> bool:
        """Whether it is closed or about to be."""
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As the transport below."""
        return self._transport.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Hand the connection to another protocol, as a WebSocket's handshake does."""
        self._transport.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol that reads the connection."""
        return self._transport.get_protocol()

    def pause_reading(self) -> None:
        """Read no more until `resume_reading`."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on reading."""
        self._transport.resume_reading()

    def is_reading(self) -> bool:
        """Whether the connection is being read."""
        return self._transport.is_reading()

    def can_write_eof(self) -> bool:
        """Whether the connection can be closed in one direction; not with TLS."""
        return self._transport.can_write_eof()

    def write_eof(self) -> None:
        """Tell the client that nothing more will be written; it may go on writing."""
        self._flush()
        self._transport.write_eof()

    def get_write_buffer_size(self) -> int:
        """How many bytes the network has not taken yet."""
        return self._transport.get_write_buffer_size() + sum(map(len, self._held))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set when the protocol is asked to pause writing."""
        self._transport.set_write_buffer_limits(high, low)
