"""One WebSocket: how it is counted and noted, and how it ends."""

import asyncio
from collections.abc import Mapping
from time import monotonic
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import State

from qserve_gateway.door.client_end import ClientEnd
from qserve_gateway.door.limits import CLIENT_LEFT, LINGER_S, Door
from qserve_gateway.door.transport import TickTransport

_SERVICE_RESTART = 1012
_UNREADABLE = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket connection, which the door counts and watches, and the access log notes.

    Args:
        door: Its limits, and where it is counted.
    """

    transport: TickTransport

    def __init__(self, door: Door, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._door = door
        self._leaving = False
        self._began = monotonic()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to watch the connection."""
        super().connection_made(transport)
        self._client_end = ClientEnd(self._door, self.transport)

    def look(self, now: float) -> None:
        """Close the connection if its client has read nothing for too long."""
        self._client_end.is_unread(now)

    def deny_unreadable(self) -> None:
        """Deny a handshake that has come, but which is none for the WebSocket library: uvicorn would wait for another.

        The library reads lines up to 8 KiB.
        """
        if not self.handshake_initiated:
            self.handshake_complete = self.close_sent = True
            self.transport.write(b"".join(self.conn.data_to_send()) or _UNREADABLE)
            self.transport.close()

    async def send(self, message: Any) -> None:
        """Send an ASGI message of the application."""
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True  # uvicorn forgets that a denial completes it, and logs an error
        if self._leaving:
            self.shutdown()

    def shutdown(self) -> None:
        """Close it because the gateway leaves, once its handshake is complete, and give the client a moment to answer.

        uvicorn hangs up at once. If the client is sending then, the connection is reset, and a proxy that has not
        passed the close frame on yet never does. One that does not read is not waited for any longer, either.
        """
        self._leaving = True
        if not self.handshake_complete:
            return
        self.stop_keepalive()
        if not (self.close_sent or self.transport.is_closing()):
            self.queue.put_nowait({"type": "websocket.disconnect", "code": _SERVICE_RESTART})
            self.conn.send_close(_SERVICE_RESTART)
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = self.disconnected = True  # what the application sends now is for nobody
            if self.read_paused:
                self.read_paused = False
                self.transport.resume_reading()
        if self.close_timer is not None:
            self.close_timer.cancel()
        self.close_timer = self.loop.call_later(LINGER_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count the WebSocket out and note it, or the response that its handshake got instead."""
        super().connection_lost(exc)
        self._door.leave_websocket(self.look, self.client[0] if self.client else "")
        # uvicorn makes no scope for a handshake that is malformed.
        unknown: dict[str, Any] = {"client": self.client, "raw_path": b"-", "http_version": "1.1", "state": {}}
        scope: Mapping[str, Any] = getattr(self, "scope", unknown)
        seconds = monotonic() - self._began
        if self.conn.state is State.CONNECTING:
            head = self.transport.head
            self._door.note(scope, CLIENT_LEFT if head is None else int(head[9:12]), self.transport.sent, seconds)
        elif self._door.log is not None:
            self._door.log.add(scope, 101, 0, seconds)
