"""The client's end of a connection: whether it reads what it is sent, and whether it is still there."""

import asyncio
import select
import socket
import struct

from qserve_gateway.door.limits import Door

_NO_LINGER = struct.pack("ii", 1, 0)


class ClientEnd:
    """What can be known of a client without its sending anything.

    Args:
        door: Says how long it may read nothing, and counts those that take longer.
        transport: The connection to it.
    """

    def __init__(self, door: Door, transport: asyncio.Transport) -> None:
        self._door = door
        self._transport = transport
        self._unsent = 0
        """Bytes that the network had not taken at the last look; their number is the same since `_unsent_since`."""
        self._unsent_since = 0.0

    def is_unread(self, now: float) -> bool:
        """Whether something waits for the client to read it; resets the connection when it has waited too long."""
        unsent = self._transport.get_write_buffer_size()
        if unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, now
        elif unsent and now - self._unsent_since > self._door.send_timeout_s:
            self._door.refused["unread"] += 1
            self.reset()
        return unsent > 0

    def has_left(self) -> bool:
        """Whether the client has closed the connection, also where what it has sent before is not read."""
        sock = self._transport.get_extra_info("socket")
        if sock is None:
            return False
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    def reset(self) -> None:
        """Close without a last attempt to send, or the kernel would keep what is not read for minutes."""
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self._transport.abort()
