"""One connection: what of its input reaches uvicorn's HTTP parser, and when the connection is closed."""

import asyncio
from time import monotonic
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from qserve_gateway.door.body_protocol import BodyProtocol
from qserve_gateway.door.client_end import ClientEnd
from qserve_gateway.door.gate import (
    LARGEST_HEAD,
    Refusal,
    inspect_head,
    inspect_part_of_head,
    refuse,
)
from qserve_gateway.door.http_1_0 import ended_by_closing
from qserve_gateway.door.limits import CLIENT_LEFT, LINGER_S, Door
from qserve_gateway.door.transport import TickTransport
from qserve_gateway.door.websocket_protocol import WebSocketProtocol

BROKEN_OFF = 500
"""The status that stands for a response that was cut off here after it had begun, whatever its head said."""
LAST_CHANCE_S = 0.4
"""Seconds that an idle connection stays open when the gateway stops, since a request may be on its way."""


class HttpProtocol(BodyProtocol):
    """uvicorn's HTTP/1.1 connection behind a gate.

    The gate finds out where heads and bodies end by itself, so the parser sees one request after the other, whole heads
    only, and nothing that has not been checked.

    Args:
        door: Limits and deadlines, shared by all connections.
    """

    def __init__(self, door: Door, **uvicorns: Any) -> None:
        super().__init__(door, **uvicorns)
        self._ip = ""
        self._head = bytearray()
        """The beginning of a head whose rest has not arrived."""
        self._deaf = False
        self._refusal: Refusal | None = None
        """What to answer once earlier requests have been answered."""
        self._waiting = b""
        """What has come in behind requests that wait for their turn."""
        self._began = 0.0
        """When the application was given the request of `_active`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch a connection; one too many is refused."""
        super().connection_made(TickTransport(transport, self.loop))
        self._client_end = ClientEnd(self._door, self.transport)
        self._ip = self.client[0] if self.client else ""
        self._since = self._door.now
        try:
            self._door.enter(self.look, self._ip)
        except Refusal as refusal:
            self._refuse(refusal)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the applications of unanswered requests that their client has left."""
        self._door.leave(self.look, self._ip)
        if self._active is not None and not self._active.response_complete:
            self._active.disconnected = True  # uvicorn tells the newest only
            self._active.message_event.set()
            # Where what answers has ended before, the connection was closed because it has failed half-way.
            failed = self._direct is None and self._task is not None and self._task.done()
            status, seconds = BROKEN_OFF if failed else CLIENT_LEFT, monotonic() - self._began
            self._door.note(self._active.scope, status, self.transport.sent, seconds)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Make the next response the last one; an idle client has a moment left to send a request."""
        self._leaving = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        else:
            self._since = self.loop.time()  # the door's clock may be so far behind that the moment would be over

    # What comes in

    def data_received(self, data: bytes) -> None:
        """Give the parser what is in order, one request after the other."""
        try:
            while data and not self._deaf:
                if self._body is not None:
                    data = self._take_body(data)
                elif not self.pipeline:
                    data = self._take_head(data)
                else:
                    # Each request that is parsed takes a hundred times the memory of its bytes.
                    self._waiting += data
                    self.flow.pause_reading()
                    return
        except Refusal as refusal:
            self._refuse(refusal)

    def _take_head(self, data: bytes) -> bytes:
        if self._head:
            data = self._finish_head(data)
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            self._hold(data)
            return b""
        head, length, websocket = inspect_head(data if end == len(data) else data[:end])
        if websocket:
            self._door.check_origin(head)
        elif length > self._door.largest_body:
            reason = f"its body is over the limit of {self._door.largest_body} bytes (QSERVE_MAX_BODY_BYTES)"
            raise Refusal(413, reason, "size")
        self._feed(head)
        if websocket:
            became = self.transport.get_protocol()
            if isinstance(became, WebSocketProtocol):
                self._door.become_websocket(self.look, became.look)
                self._deaf = True
        elif length:
            self._begin_body(length)
        if self._leaving and not self._deaf:
            self.cycle.keep_alive = False
        return data[end:]

    def _finish_head(self, data: bytes) -> bytes:
        """Add to a head and give it once it is whole; what was looked at before is not looked at again."""
        begin = max(0, len(self._head) - 3)
        self._head += data
        if self._head.find(b"\r\n\r\n", begin) < 0:
            if len(self._head) > LARGEST_HEAD:
                refuse(f"its headers are over {LARGEST_HEAD} bytes", "size")
            inspect_part_of_head(self._head[begin:])
            return b""
        whole = bytes(self._head)
        self._head.clear()
        return whole

    def _hold(self, data: bytes) -> None:
        if data:
            inspect_part_of_head(data)
            self._head += data
            self._since = self._heard = self._door.now
            if len(data) > LARGEST_HEAD:
                refuse(f"its headers are over {LARGEST_HEAD} bytes", "size")

    def _begin_body(self, length: int) -> None:
        super()._begin_body(length)
        self.transport.close_gently = self._close_before_the_end

    def _close_before_the_end(self) -> None:
        """Close while a body comes in, so that a whole response reaches the client and one that was cut does not."""
        self.transport.close_gently = None
        if self._active is not None and self._active.response_complete:
            self._hang_up()
        else:
            self.transport.close()

    def handle_websocket_upgrade(self) -> None:
        """Go on as a WebSocket, unless an earlier request is still waiting for its response."""
        if self._active is not None and not self._active.response_complete:
            refuse("a WebSocket's handshake before the response to an earlier request", "framing")
        super().handle_websocket_upgrade()
        websocket = self.transport.get_protocol()
        if isinstance(websocket, WebSocketProtocol):
            websocket.deny_unreadable()
            if self._leaving:
                websocket.shutdown()

    # What goes out

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active = cycle
        self._began = monotonic()
        if cycle.scope["http_version"] == "1.0":
            app = ended_by_closing(app, cycle, self._client_end.reset)
        elif self.begin(cycle):
            return
        self.run_app(app)

    def on_response_complete(self) -> None:
        """Go on with the next request, or wait for one. The door's clock replaces uvicorn's timer per request."""
        self.server_state.total_requests += 1
        self._since = self._door.now
        self._note()
        if self.transport.is_closing():
            return
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            if self._leaving and not self.pipeline:
                cycle.keep_alive = False
            self._start_asgi_task(cycle, app)
        elif self._refusal is not None:
            self._answer(self._refusal)
        if self.flow.read_paused or self._waiting:
            self._read_on()

    def _read_on(self) -> None:
        if self.transport.is_closing():
            return
        data, self._waiting = self._waiting, b""
        if data:
            self.data_received(data)
        if not self._waiting:
            self.flow.resume_reading()

    def _note(self) -> None:
        transport = self.transport
        if transport.head is not None and self._active is not None:
            self._door.note(self._active.scope, int(transport.head[9:12]), transport.sent, monotonic() - self._began)
        transport.head, transport.sent = None, 0

    def _refuse(self, refusal: Refusal) -> None:
        """Read no further, and say why as soon as earlier requests have been answered."""
        self._deaf = True
        self._since = self._door.now
        if self._reader is not None:
            self._reader.stop()
        concerned = self.cycle if self._body is not None else None
        if concerned is not None and self.pipeline and self.pipeline[0][0] is concerned:
            self.pipeline.popleft()
        active = self._active
        if active is None or active.response_complete:
            self._answer(refusal)
        elif active is not concerned:
            self._refusal = refusal
        elif active.response_started:
            self.transport.close()  # cut off, so it does not look whole
        else:
            # Its application hears that the client has left.
            active.disconnected = True
            active.message_event.set()
            active.response_complete = True
            self._answer(refusal)

    def _answer(self, refusal: Refusal) -> None:
        request_id, headers, body = self._door.refusal_response(refusal)
        if self._door.log is not None:
            noted = {"request_id": request_id}
            about = {"client": self.client, "method": "-", "raw_path": b"-", "http_version": "1.1", "state": noted}
            self._door.log.add(about, refusal.status, len(body), 0.0)
        lines = [b"%b: %b\r\n" % field for field in (*self.server_state.default_headers, *headers)]
        self.transport.write(b"".join((STATUS_LINE[refusal.status], *lines, b"\r\n", body)))
        self._hang_up()

    def _hang_up(self) -> None:
        """Close in two steps: closing at once while data arrives would destroy what is on its way to the client."""
        self._deaf = True
        self._since = self._door.now
        self._refusal = None
        self.transport.close_gently = None
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def look(self, now: float) -> None:
        """Close the connection if one of its deadlines has passed."""
        if self._client_end.is_unread(now) or self._refusal is not None:
            return  # until the requests before have been answered
        if self._deaf:
            if now - self._since > LINGER_S:
                self._close()
        elif self.flow.read_paused:
            if self.pipeline and self._client_end.has_left():
                self.transport.abort()
                return
            # Somebody here takes his time, not the client.
            self._since, self._heard = self._since + (now - self._heard), now
        elif self._head or self._body is not None:
            self._look_at_request(self._door, now)
        elif self._active is None or self._active.response_complete:
            patience = LAST_CHANCE_S if self._leaving else self._door.keep_alive_s
            if now - self._since > patience:
                self._close()

    def _close(self) -> None:
        """Close; without more ado if that has begun before: a TLS client that does not read never agrees to it."""
        if self.transport.is_closing():
            self.transport.abort()
        else:
            self.transport.close()

    def _look_at_request(self, door: Door, now: float) -> None:
        waited = now - self._since
        if self._body is None:
            if waited > door.header_timeout_s:
                self._refuse(Refusal(408, f"no whole request within {door.header_timeout_s:g} s", "slow"))
            return
        floor = door.body_bytes_per_s
        too_slow = floor and waited > door.body_timeout_s + self._received / floor
        if too_slow or now - self._heard > door.body_timeout_s:
            self._refuse(Refusal(408, "its body comes too slowly", "slow"))
