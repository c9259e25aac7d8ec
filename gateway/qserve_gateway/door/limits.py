"""The limits and deadlines of all connections of a listener."""

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any
from urllib.parse import urlsplit

from qserve.settings import Settings
from qserve_gateway.door.access_log import AccessLog
from qserve_gateway.door.gate import Refusal, header_in
from qserve_gateway.door.request_counts import RequestCounts

CLIENT_LEFT = 499
"""The status that stands for a client which left before its response was complete, as in nginx."""
SWEEP_S = 0.5
_LOOKS_AT_ONCE = 50
_SHORTEST_PAUSE_S = 0.005
_LATE_S = 0.2
"""A sweep that comes so much too late says that this process was held up."""
LINGER_S = 1.5
"""Seconds that a refused client may go on sending; closing at once could destroy the answer on its way."""


Look = Callable[[float], None]
"""Called twice a second with the time; closes a connection if one of its deadlines has passed."""


class Door:
    """Limits and deadlines. One coarse clock and one timer serve all connections: a request costs no timer.

    Args:
        settings: The limits.
        has_log: Write the access log that the settings ask for.

    Attributes:
        now: The event loop's time, at most half a second old.
        refused: Kind of refusal -> how often, for the metrics.
        counts: Counts responses.
        log: Where responses are noted; None for nowhere.
    """

    def __init__(self, settings: Settings, *, has_log: bool = True) -> None:
        self.header_timeout_s = settings.http_header_timeout_s
        self.body_timeout_s = settings.http_body_timeout_s
        self.body_bytes_per_s = settings.http_body_bytes_per_s
        self.keep_alive_s = settings.http_keep_alive_s
        self.send_timeout_s = settings.http_send_timeout_s
        self.largest_body = settings.max_body_bytes
        self.now = 0.0
        self.refused: Counter[str] = Counter()
        self.websockets = 0
        self.counts = RequestCounts()
        self.log = AccessLog(settings.access_log) if has_log and settings.access_log != "off" else None
        self._most = settings.http_max_connections
        self._most_per_ip = settings.http_max_connections_per_ip
        listed = settings.websocket_origins.lower().split(",")
        self._origins = frozenset(origin.strip().rstrip("/") for origin in listed)
        self._looks: set[Look] = set()
        self._ahead: list[Look] = []
        self._pause_s = SWEEP_S
        self._due = 0.0
        self._has_waited = False
        self._by_ip: Counter[str] = Counter()
        self._ids = request_ids()
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Begin to watch deadlines."""
        self._due = asyncio.get_running_loop().time()
        self._sweep()

    async def close(self) -> None:
        """Stop watching deadlines, and write what is left of the access log."""
        if self._timer is not None:
            self._timer.cancel()
        if self.log is not None:
            await self.log.close()

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        self.now = loop.time()
        if self.now - self._due > _LATE_S and not self._has_waited:
            # What has come meanwhile is not read yet, and its connection only seems to be idle.
            self._has_waited = True
            self._timer = loop.call_later(_SHORTEST_PAUSE_S, self._sweep)
            return
        self._has_waited = False
        if not self._ahead:
            self._ahead = list(self._looks)
            # Spread over the time until the next sweep: 10,000 at once hold up every request for 50 ms.
            self._pause_s = max(_SHORTEST_PAUSE_S, SWEEP_S / (len(self._ahead) // _LOOKS_AT_ONCE + 1))
        for look in self._ahead[-_LOOKS_AT_ONCE:]:
            if look in self._looks:  # else its connection has gone meanwhile
                look(self.now)
        del self._ahead[-_LOOKS_AT_ONCE:]
        self._due = self.now + self._pause_s
        self._timer = loop.call_later(self._pause_s, self._sweep)

    @property
    def connections(self) -> int:
        """How many connections are open, WebSockets included."""
        return len(self._looks)

    def enter(self, look: Look, ip: str) -> None:
        """Count a new connection and begin to watch it.

        Raises:
            Refusal: There are too many. The connection is watched all the same until it `leave`s.
        """
        self._looks.add(look)
        self._by_ip[ip] += 1
        if self.connections > self._most:
            raise Refusal(503, f"more than {self._most} connections", "connections")
        if ip and 0 < self._most_per_ip < self._by_ip[ip]:
            raise Refusal(429, f"more than {self._most_per_ip} connections from one address", "connections")

    def leave(self, look: Look, ip: str) -> None:
        """Count out a connection that is gone."""
        self._looks.discard(look)
        self._by_ip[ip] -= 1
        if self._by_ip[ip] <= 0:
            del self._by_ip[ip]

    def become_websocket(self, before: Look, look: Look) -> None:
        """Count a connection as a WebSocket from now on, which has deadlines of its own."""
        self._looks.discard(before)
        self._looks.add(look)
        self.websockets += 1

    def leave_websocket(self, look: Look, ip: str) -> None:
        """Count out a WebSocket that is gone."""
        self.websockets -= 1
        self.leave(look, ip)

    def note(self, scope: Mapping[str, Any], status: int, size: int, seconds: float) -> None:
        """Count a response and write it to the access log."""
        state = scope["state"]
        self.counts.count(state.get("deployment", ""), status, seconds, state.get("trace_id"))
        if self.log is not None:
            self.log.add(scope, status, size, seconds)

    def check_origin(self, head: bytes) -> None:
        """Refuse the WebSockets of foreign pages: a browser opens them wherever a page says, with the user's cookies.

        Raises:
            Refusal: The page is neither of the gateway's own host nor of an origin that is allowed.
        """
        origin = header_in(head, b"origin").decode("latin-1").lower().rstrip("/")
        if not origin or "*" in self._origins or origin in self._origins:
            return
        if not same_host(origin, header_in(head, b"host").decode("latin-1")):
            raise Refusal(403, "WebSockets are not open to pages of this origin (QSERVE_WEBSOCKET_ORIGINS)", "origin")

    def refusal_response(self, refusal: Refusal) -> tuple[str, list[tuple[bytes, bytes]], bytes]:
        """Make the request's id, and the headers and the body of the answer, and count it."""
        self.refused[refusal.kind] += 1
        request_id = next(self._ids)
        about = "Bad request" if refusal.status == 400 else "Refused"
        body = f"{about}: {refusal.reason}. Request {request_id}.".encode()
        headers = [(b"x-request-id", request_id.encode()), (b"connection", b"close")]
        if refusal.status == 204:
            return request_id, headers, b""
        text = (b"content-type", b"text/plain; charset=utf-8")
        return request_id, [text, (b"content-length", b"%d" % len(body)), *headers], body


def request_ids() -> Iterator[str]:
    """Make ids for requests that bring none."""
    prefix = os.urandom(8).hex()
    return (f"{prefix}{number:08x}" for number in count(1))


def same_host(origin: str, host: str) -> bool:
    """Tell whether an Origin belongs to the host that a request was sent to; "null" never does."""
    try:
        parts = urlsplit(origin)
        default = {"http": 80, "https": 443, "ws": 80, "wss": 443}.get(parts.scheme)
        asked = urlsplit(f"//{host.lower()}")
        # Behind a proxy that ends TLS our own scheme says nothing.
        return bool(parts.hostname) and (parts.hostname, parts.port or default) in (
            {(asked.hostname, asked.port)} if asked.port else {(asked.hostname, 80), (asked.hostname, 443)}
        )
    except ValueError:
        return False
