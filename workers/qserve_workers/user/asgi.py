"""Running an ASGI application: on a request, on a WebSocket, and its lifespan."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from qserve.background import spawn
from qserve.context import current_call
from qserve.errors import StreamBroken
from qserve.wire.channel import Channel
from qserve.wire.messages import HttpRequest, HttpResponse, WebSocketEvent, decode_websocket_event, encode
from qserve_workers.user.user_entry import UserCodeEscape, enter, what_was_raised

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
ASGIApp = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]

OnComplete = Callable[[HttpResponse | None], None]
"""Called with a response that is complete, or with None where it was streamed."""

# uvicorn's. From 2.4 on Starlette would no longer listen for the client's leaving while it streams, and so leave a
# generator alone that waits for something that may never come.
_ASGI = {"version": "3.0", "spec_version": "2.3"}
_ASGI_WEBSOCKET = {"version": "3.0", "spec_version": "2.4"}
_HOLD_S = 0.001
_LAST_WORD_S = 1.0
_UNREAD_S = 30.0
"""How long an application may go on with a response that nobody reads any more, to come to its background tasks."""
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


class ClientLeft(StreamBroken, OSError):
    """The client is gone; frameworks expect an OSError."""


class Exchange:
    """One request and its response, as an ASGI application sees them: `receive` and `send`.

    A response that is complete at once is collected; one that takes its time is streamed over the call's channel: its
    status and headers first, then each part as it is sent. The same channel brings a body that follows its request, and
    the news that the client has left.

    Args:
        on_complete: Called when the application has sent the end of its response, with the response, or with None where
            it was streamed. The application may go on afterwards, with background tasks.
    """

    __slots__ = (
        *("_channel", "_first", "_flushing", "_follows", "_held", "_on_complete", "_open_channel", "_response"),
        *("_timer", "_unread_until", "complete", "streamed"),
    )

    def __init__(
        self, request: HttpRequest, open_channel: Callable[[], Channel], on_complete: OnComplete | None = None
    ) -> None:
        self._open_channel = open_channel
        self._on_complete = on_complete
        self._channel: Channel | None = None
        self._first: bytes | None = request.body
        self._follows = request.body_follows
        self._response = HttpResponse(0, [], b"")
        self._held: bytes | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._flushing: asyncio.Task[None] | None = None
        self._unread_until = 0.0
        self.complete = False
        self.streamed = False
        if request.body_follows:
            self.channel.greet()

    @property
    def channel(self) -> Channel:
        """The call's channel, opened when it is first needed."""
        if self._channel is None:
            self._channel = self._open_channel()
        return self._channel

    async def receive(self) -> Message:
        """The body, then nothing until the client leaves or the response is complete."""
        if self._first is not None:
            body, self._first = self._first, None
            return {"type": "http.request", "body": body, "more_body": self._follows}
        if self._follows:
            with contextlib.suppress(StreamBroken):
                part = await self.channel.receive_part()
                self._follows = part is not None
                return {"type": "http.request", "body": part or b"", "more_body": self._follows}
        elif not self.complete:
            await self.channel.wait_broken()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Collect the response, or stream it on. What is sent to a client that has left is dropped, as under uvicorn.

        Raises:
            ClientLeft: It has left long ago.
            RuntimeError: The message has no place here.
        """
        kind, begun = message["type"], self._response.status != 0
        if self.complete:
            raise RuntimeError(f"the response is complete, and {kind!r} was sent after its end")
        if kind != ("http.response.body" if begun else "http.response.start"):
            raise RuntimeError(f"{kind!r} was sent {'after' if begun else 'before'} the beginning of the response")
        if not begun:
            headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
            self._response = HttpResponse(message["status"], headers, b"")
            # Most responses follow at once as a whole; middlewares turn these into a part and an empty end. So wait a
            # moment for the end before the beginning leaves by itself.
            self._timer = asyncio.get_running_loop().call_later(_HOLD_S, self._begin_flush)
            return
        try:
            await self._send_body(bytes(message.get("body", b"")), more=message.get("more_body", False))
        except StreamBroken as exc:
            await self._drop(exc)

    async def _drop(self, error: StreamBroken) -> None:
        """Go on without the client; who listens for its leaving ends the response at the next moment of its own."""
        now = asyncio.get_running_loop().time()
        if not self._unread_until:
            self._unread_until = now + _UNREAD_S
        elif now > self._unread_until:
            raise ClientLeft(str(error)) from error
        else:
            await asyncio.sleep(0)  # a generator may have no such moment

    async def _send_body(self, body: bytes, *, more: bool) -> None:
        if self._held is not None or self._flushing is not None:
            await self._flush(anyway=more)
        if self.streamed:
            if body:
                await self.channel.send(body)
        elif more:
            self._held = body
        else:
            self._stop_timer()
            self._response = HttpResponse(self._response.status, self._response.headers, (self._held or b"") + body)
        if not more:
            self.complete = True
            if self._on_complete is not None:
                self._on_complete(self.response())
            if self._channel is not None:
                self._channel.close(StreamBroken("the response is complete"))

    async def settle(self) -> None:
        """The application has ended: what it sent last is on its way, and nothing is left to do."""
        if self.complete:
            return
        if self._held is not None or self._flushing is not None:
            with contextlib.suppress(StreamBroken):
                await self._flush(anyway=True)
        self._stop_timer()

    async def _flush(self, *, anyway: bool) -> None:
        """Wait for the first part to be sent; if its time has not come yet, send it only if wanted `anyway`."""
        if self._stop_timer() and anyway:
            self._begin_flush()
        if self._flushing is not None:
            await asyncio.shield(self._flushing)  # who gives up waiting for it would cancel it
            self._flushing = None

    def _stop_timer(self) -> bool:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        return timer is not None

    def _begin_flush(self) -> None:
        self._timer = None
        held, self._held = self._held or b"", None
        self.streamed = True
        self._flushing = spawn(self._send_first(held))

    async def _send_first(self, held: bytes) -> None:
        with contextlib.suppress(StreamBroken):  # the next `send` will say it
            await self.channel.send(encode(self._response))
            if held:
                await self.channel.send(held)

    @property
    def client_has_left(self) -> bool:
        """Whether nobody waits for a response any more."""
        return self._channel is not None and self._channel.is_broken

    def response(self) -> HttpResponse | None:
        """The collected response, None for one that was streamed; only once it is complete."""
        return None if self.streamed else self._response


async def run_asgi(
    app: ASGIApp,
    request: HttpRequest,
    open_channel: Callable[[], Channel],
    state: dict[str, Any] | None = None,
    on_complete: OnComplete | None = None,
) -> HttpResponse | None:
    """Run an application on one request, background tasks included. What it raises becomes what uvicorn would send.

    Args:
        state: The state its lifespan left; each request gets a copy, as ASGI wants it.
        on_complete: As for `Exchange`.

    Returns:
        The response; None if it was streamed.

    Raises:
        StreamBroken: The response was cut short after its beginning had been sent.
    """
    scope = http_scope(request)
    if state is not None:
        scope["state"] = state.copy()
    exchange = Exchange(request, open_channel, on_complete)
    try:
        await enter(app, scope, exchange.receive, exchange.send)
    except Exception as exc:
        if not isinstance(exc, StreamBroken):
            logger.exception("Exception in ASGI application, request %s %s", request.method, request.request_id)
            _note_error(exc)
        await exchange.settle()
        # Starlette raises again what it has answered already.
        if not exchange.complete:
            if exchange.streamed:
                raise StreamBroken("the application failed in its response; the log of its replica says how") from exc
            return _INTERNAL_SERVER_ERROR
    if exchange.complete:
        return exchange.response()
    await exchange.settle()
    if exchange.client_has_left:
        raise StreamBroken("the client left before the end of its response")
    if exchange.streamed:
        raise StreamBroken("the application returned before the last part of its response, with more_body=False")
    logger.error("ASGI application returned without a response, request %s", request.request_id)
    return _INTERNAL_SERVER_ERROR


def _note_error(error: Exception) -> None:
    """Let the hooks know of what the client is not told."""
    call = current_call.get()
    if call is not None:
        call.app_error = what_was_raised(error)


class Socket:
    """One WebSocket, as an ASGI application sees it; its events come and go over the call's channel."""

    def __init__(self, request: HttpRequest, channel: Channel) -> None:
        self._request = request
        self._channel = channel
        self._connected = False
        self._answered = False
        self._closed = False
        self._disconnect: Message = {"type": "websocket.disconnect", "code": 1006, "reason": ""}

    async def run(self, app: ASGIApp, state: dict[str, Any]) -> None:
        """Run an application on it.

        Args:
            state: The state its lifespan left; each WebSocket gets a copy.

        Raises:
            StreamBroken: The application failed.
        """
        scope = http_scope(self._request)
        del scope["method"]
        scope |= {"type": "websocket", "asgi": _ASGI_WEBSOCKET, "subprotocols": list(self._request.subprotocols)}
        scope["extensions"] = {"websocket.http.response": {}}
        scope["state"] = state.copy()
        try:
            await enter(app, scope, self._receive, self._send)
        except Exception as exc:
            if not isinstance(exc, StreamBroken):
                logger.exception("Exception in ASGI application, WebSocket %s", self._request.request_id)
                _note_error(exc)
                await self._deny_unanswered()
            raise StreamBroken("the application failed; the log of its replica says how") from exc
        await self._deny_unanswered()

    async def close(self, code: int, reason: str) -> None:
        """Close it on the server's behalf; the application hears that it was disconnected."""
        if self._closed:
            return
        self._closed = True
        self._disconnect = {"type": "websocket.disconnect", "code": code, "reason": reason}
        with contextlib.suppress(StreamBroken, TimeoutError):
            async with asyncio.timeout(_LAST_WORD_S):
                await self._channel.send(encode(WebSocketEvent("close", code=code, reason=reason)))
        self._channel.close(StreamBroken(reason))

    async def _deny_unanswered(self) -> None:
        if self._answered or self._closed:
            return
        denial = _INTERNAL_SERVER_ERROR
        with contextlib.suppress(StreamBroken):
            await self._channel.send(encode(WebSocketEvent("deny", code=denial.status, headers=denial.headers)))
            await self._channel.send(encode(WebSocketEvent("deny.body", data=denial.body)))

    async def _receive(self) -> Message:
        if not self._connected:
            self._connected = True
            return {"type": "websocket.connect"}
        try:
            data = await self._channel.receive()
        except StreamBroken:
            data = None
        if data is None:
            return self._disconnect
        return _websocket_message(decode_websocket_event(data))

    async def _send(self, message: Message) -> None:
        try:
            if self._closed or self._channel.peer_has_ended:
                raise StreamBroken("the WebSocket is closed: the application can send nothing more")
            self._answered = True
            await self._channel.send(encode(_websocket_event(message)))
        except StreamBroken as exc:
            raise ClientLeft(str(exc)) from exc


def _websocket_message(event: WebSocketEvent) -> Message:
    if event.type == "disconnect":
        return {"type": "websocket.disconnect", "code": event.code, "reason": event.reason}
    message: Message = {"type": "websocket.receive"}
    if event.text is not None:
        message["text"] = event.text
    else:
        message["bytes"] = event.data
    return message


def _websocket_event(message: Message) -> WebSocketEvent:
    kind = message["type"].removeprefix("websocket.")
    headers = [(bytes(name), bytes(value)) for name, value in message.get("headers") or ()]
    if kind == "accept":
        return WebSocketEvent(kind, subprotocol=message.get("subprotocol"), headers=headers)
    if kind == "send":
        return WebSocketEvent(kind, text=message.get("text"), data=message.get("bytes"))
    if kind == "close":
        # FastAPI gives its validation errors, a list, as the reason for not accepting.
        return WebSocketEvent(kind, code=message.get("code") or 1000, reason=str(message.get("reason") or ""))
    if kind == "http.response.start":
        return WebSocketEvent("deny", code=message["status"], headers=headers)
    more = "more" if message.get("more_body", False) else ""
    return WebSocketEvent("deny.body", data=message.get("body", b""), reason=more)


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
        if self._failure is not None or self._task.done():
            await self._task
        if self._failure is not None:
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
            await enter(self._app, scope, self._inbox.get, self._send)
        except Exception as exc:
            # An application that knows no lifespan may raise at the sight of it, but has no reason to end the process.
            if self._started.is_set() or self._failure is not None or isinstance(exc, UserCodeEscape):
                raise
            logger.debug("The application knows no lifespan", exc_info=True)

    async def _send(self, message: Message) -> None:
        if message["type"] == "lifespan.startup.complete":
            self._started.set()
        elif message["type"] in ("lifespan.startup.failed", "lifespan.shutdown.failed"):
            self._failure = message.get("message", "")
        elif message["type"] != "lifespan.shutdown.complete":
            # From an application that takes every scope for a request. As uvicorn does: it knows no lifespan then.
            raise RuntimeError(f"{message['type']!r} was sent in answer to the lifespan, which knows no such message")
