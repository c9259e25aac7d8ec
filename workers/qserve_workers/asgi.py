"""Running an ASGI application on whole requests, and its lifespan."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from qserve.messages import HttpRequest, HttpResponse

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
ASGIApp = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]

# Since 2.4 a server says by an OSError of `send` that the client is gone, so applications need not listen for it.
_ASGI = {"version": "3.0", "spec_version": "2.4"}
_INTERNAL_SERVER_ERROR = HttpResponse(
    500,
    [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"21")],
    b"Internal Server Error",
)


def http_scope(request: HttpRequest) -> dict[str, Any]:
    """The ASGI scope of a request: full path plus root_path, as Starlette and FastAPI expect it."""
    return {
        "type": "http",
        "asgi": _ASGI,
        "http_version": request.http_version,
        "method": request.method,
        "scheme": request.scheme,
        "path": request.path,
        "raw_path": request.raw_path,
        "query_string": request.query_string,
        "root_path": request.root_path,
        "headers": request.headers,
        "client": request.client,
        "server": request.server,
    }


class Exchange:
    """One request and its response, as an ASGI application sees them: `receive` and `send`."""

    __slots__ = ("_body", "_chunks", "_finished", "_headers", "_status", "complete")

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._chunks: list[bytes] = []
        self._finished: asyncio.Future[None] | None = None
        self.complete = False

    async def receive(self) -> Message:
        """The body at once; after that nothing until the response is complete."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if not self.complete:
            if self._finished is None:
                self._finished = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._finished)
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Collect the response."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
        elif message["type"] == "http.response.body":
            self._chunks.append(bytes(message.get("body", b"")))
            if not message.get("more_body", False):
                self.complete = True
                if self._finished is not None and not self._finished.done():
                    self._finished.set_result(None)

    def response(self) -> HttpResponse:
        """The collected response; only once it is complete."""
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        return HttpResponse(self._status, self._headers, body)


async def run_asgi(app: ASGIApp, request: HttpRequest, state: dict[str, Any] | None = None) -> HttpResponse:
    """Run an application on one request, background tasks included. What it raises becomes what uvicorn would send.

    Args:
        state: The state its lifespan left; each request gets a copy, as ASGI wants it.
    """
    scope = http_scope(request)
    if state is not None:
        scope["state"] = state.copy()
    exchange = Exchange(request.body)
    try:
        await app(scope, exchange.receive, exchange.send)
    except asyncio.CancelledError:
        raise
    except BaseException:  # an endpoint that calls sys.exit() must not end the replica
        logger.exception("Exception in ASGI application, request %s %s", request.method, request.request_id)
        # Starlette raises again what it has answered already; a response cut short is not sent at all.
        return exchange.response() if exchange.complete else _INTERNAL_SERVER_ERROR
    if not exchange.complete:
        logger.error("ASGI application returned without a response, request %s", request.request_id)
        return _INTERNAL_SERVER_ERROR
    return exchange.response()


class Lifespan:
    """The lifespan of an application: `startup`, then `shutdown`, both in one task as contexts of anyio need it."""

    def __init__(self, app: ASGIApp) -> None:
        self.state: dict[str, Any] = {}
        self._app = app
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._started = asyncio.Event()
        self._failure: str | None = None
        self._task: asyncio.Task[None] | None = None

    async def startup(self) -> None:
        """Run the startup hooks. An application that knows no lifespan is fine without.

        Raises:
            Exception: What a startup hook raised.
        """
        self._task = asyncio.create_task(self._run())
        self._inbox.put_nowait({"type": "lifespan.startup"})
        started = asyncio.create_task(self._started.wait())
        try:
            await asyncio.wait((self._task, started), return_when=asyncio.FIRST_COMPLETED)
        finally:
            started.cancel()
        if self._failure is not None:
            await self._task
            raise RuntimeError(f"The application's startup failed:\n{self._failure}")

    async def shutdown(self) -> None:
        """Run the shutdown hooks.

        Raises:
            Exception: What a shutdown hook raised.
        """
        if self._task is None or self._task.done():
            return
        self._inbox.put_nowait({"type": "lifespan.shutdown"})
        await self._task

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        try:
            await self._app(scope, self._inbox.get, self._send)
        except Exception:
            if self._started.is_set() or self._failure is not None:
                raise
            logger.debug("The application knows no lifespan", exc_info=True)

    async def _send(self, message: Message) -> None:
        if message["type"] == "lifespan.startup.complete":
            self._started.set()
        elif message["type"] in ("lifespan.startup.failed", "lifespan.shutdown.failed"):
            self._failure = message.get("message", "")
