"""Requests that are answered without a task, as most are: those without a body, whose response comes in one piece.

uvicorn runs the application in a task for each request, and looks at each header of the response a second time. Both
together are a fifth of what a small request costs the gateway.
"""

import asyncio
from typing import Any

from starlette.types import ASGIApp, Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from qserve_gateway.door.transport import TickTransport


class DirectRequest:
    """A request that is being answered without a task. Its end is one of these, or an answer to its connection."""

    def leave(self) -> None:
        """Its client has left."""
        raise NotImplementedError

    def give_up(self) -> None:
        """The gateway stops, and waits no longer."""
        raise NotImplementedError


class DirectApp:
    """An ASGI application that can answer without a task."""

    def begin(self, scope: Scope, connection: "DirectProtocol") -> DirectRequest | None:
        """Begin to answer a request; None for one that has to be answered over ASGI.

        Later, and once, the answer goes to `respond` or `run_app` of the connection, unless the client leaves first.
        """
        raise NotImplementedError


class DirectProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 connection, which can answer a request without a task."""

    transport: TickTransport

    def __init__(self, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._begin = self.app.begin if isinstance(self.app, DirectApp) else None
        self._active: RequestResponseCycle | None = None
        """The request whose response is being made; `cycle` is the newest one, which may wait behind it."""
        self._direct: DirectRequest | None = None
        """The same, where it is answered without a task."""
        self._task: asyncio.Task[None] | None = None
        """Answers it, or answered the last one that was answered in a task."""
        self._defaults: list[tuple[bytes, bytes]] = []
        self._default_lines = b""

    def begin(self, cycle: RequestResponseCycle) -> bool:
        """Begin to answer the active request without a task; False where that cannot be."""
        if self._begin is None or cycle.waiting_for_100_continue:
            return False
        direct = self._begin(cycle.scope, self)  # type: ignore[arg-type]
        if direct is None:
            return False
        if self._active is cycle and not cycle.response_complete:
            self._direct = direct
        return True

    def respond(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> bool:
        """Write the response to the active request as a whole.

        Args:
            headers: Checked and in lower case; with the length of the body, and without those of the connection.

        Returns:
            Whether it was written. It was not if the client does not read: then it has to wait, in a task.
        """
        cycle = self._active
        assert cycle is not None
        if self.flow.write_paused:
            return False
        self._direct = None
        if cycle.default_headers is not self._defaults:  # uvicorn makes new ones each second
            self._defaults = cycle.default_headers
            self._default_lines = b"".join(b"%b: %b\r\n" % field for field in self._defaults)
        parts = [STATUS_LINE[status], self._default_lines]
        for name, value in headers:
            parts += (name, b": ", value, b"\r\n")
        parts += (b"\r\n", body) if cycle.keep_alive else (b"connection: close\r\n\r\n", body)
        self.transport.write_whole(b"".join(parts))
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()
        return True

    def run_app(self, app: ASGIApp) -> None:
        """Let an ASGI application answer the active request, in a task."""
        cycle = self._active
        assert cycle is not None
        self._direct = None
        self._task = task = self.loop.create_task(cycle.run_asgi(app))  # type: ignore[arg-type]
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever makes the response that its client has left."""
        direct, self._direct = self._direct, None
        if direct is not None:
            direct.leave()
        super().connection_lost(exc)

    def give_up(self) -> None:
        """Wait no longer for an answer, because the gateway stops."""
        if self._direct is not None:
            self._direct.give_up()
