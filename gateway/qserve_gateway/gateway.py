"""The gateway as an ASGI application: one request, from its path to its response."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from qserve.calls.pending import Outcome, PendingCall
from qserve.errors import ConfigurationError, PayloadTooLarge, QServeError, StreamBroken
from qserve.failpoints import reach
from qserve.settings import Settings
from qserve.wire.channel import Channel
from qserve.wire.messages import HTTP, WEBSOCKET, HttpRequest, HttpResponse, encode
from qserve.wire.spec import DeploymentSpec
from qserve_gateway.api_keys import ApiKeys, KeyRefused
from qserve_gateway.departures import Departures
from qserve_gateway.door.limits import request_ids
from qserve_gateway.durable.call_events import EventStream
from qserve_gateway.durable.durable_requests import PATH, CallPages, Wish, wish_of
from qserve_gateway.headers import SPOOFED, UNUSUAL, Headers, end_to_end
from qserve_gateway.respond import json_response, local_error_response, outcome_response, send_response, text_response
from qserve_gateway.routes import Route, RouteTable
from qserve_gateway.streaming import Upload, body_too_large, stream_response
from qserve_gateway.websocket import WebSocketBridge, deny

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
"""A request with one of these may be run again after its replica died."""

_KEPT = frozenset({b"prefer", b"idempotency-key"})
"""A request with one of these may want to be a durable call."""

Named = dict[bytes, bytes]
"""Headers by lower-case name, the last of each; for looking, not for handing on."""

_TIMEOUT = b"x-request-timeout-ms"
_is_milliseconds = re.compile(rb"[0-9]{1,9}").fullmatch
_is_request_id = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}").fullmatch


class Calls(Protocol):
    """The part of `qserve.calls.client.Client` that the gateway uses."""

    def prepare(
        self,
        deployment: str,
        *,
        kind: int,
        method: str,
        payload: bytes,
        timeout_s: float,
        safe: bool,
        on_outcome: Callable[[Outcome], None],
    ) -> PendingCall:
        """Make a call ready to be put; `on_outcome` is called exactly once, on the loop."""

    def open_channel(self, pending: PendingCall) -> Channel:
        """Prepare it for traffic beside its reply."""

    def put(self, pending: PendingCall) -> None:
        """Put it on its deployment's queue."""

    def cancel(self, pending: PendingCall) -> None:
        """Withdraw it."""


class Refused(Exception):
    """The request is answered here and goes no further."""

    def __init__(self, response: HttpResponse) -> None:
        super().__init__(response.status)
        self.response = response


class Stream:
    """A response that comes in parts."""

    __slots__ = ("channel", "pending", "upload")

    def __init__(self, channel: Channel, pending: PendingCall) -> None:
        self.channel = channel
        self.pending = pending
        self.upload: Upload | None = None


Answer = Outcome | Stream | None
"""What a request's call comes to; None: the client has left."""


class ClientLeft(Exception):
    """The client disconnected: nobody reads a response."""


class Gateway:
    """The ASGI application.

    Args:
        calls: Where calls are put.
        settings: Limits and defaults.
        keys: Who may come in, None: everybody.
        pages: For durable calls; None: there are none.
    """

    def __init__(
        self, calls: Calls, settings: Settings, keys: ApiKeys | None = None, pages: CallPages | None = None
    ) -> None:
        self._calls = calls
        self._pages = pages
        self._settings = settings
        self._keys = keys
        self._specs: tuple[DeploymentSpec, ...] = ()
        self._root_path = ""
        self._routes = RouteTable()
        self._stack: Callable[[Scope, Receive, Send], Awaitable[None]] = self.serve
        self._departures = Departures()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ids = request_ids()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        # Not async: without middlewares the server awaits `serve` itself, a frame less per request.
        return self._stack(scope, receive, send)

    @property
    def routes(self) -> dict[str, str]:
        """Route prefix -> deployment name, as `/-/routes` shows it."""
        return self._routes.names

    def use_deployments(self, specs: Iterable[DeploymentSpec]) -> None:
        """Routes requests to these deployments from now on."""
        self._specs = tuple(specs)
        self._routes = RouteTable(self._specs, root_path=self._root_path, timeout_s=self._settings.http_timeout_s)

    def use_http_options(self, root_path: str, middlewares: Iterable[Middleware]) -> None:
        """Lives under `root_path` and wraps everything in the middlewares, the first one outermost.

        Raises:
            ConfigurationError: A middleware refuses its arguments; nothing has changed then.
        """
        stack: ASGIApp = self.serve
        for middleware in reversed(tuple(middlewares)):
            try:
                stack = middleware.cls(stack, *middleware.args, **middleware.kwargs)
            except Exception as exc:
                raise ConfigurationError(f"{middleware!r} cannot be set up: {type(exc).__name__}: {exc}") from exc
        self._stack = stack
        self._root_path = root_path.rstrip("/")
        self.use_deployments(self._specs)

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, inside the middlewares."""
        if scope["type"] == "websocket":
            await self._serve_websocket(scope, receive, send)
            return
        named = dict(scope["headers"])
        request_id = self._request_id(named.get(b"x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        try:
            response = await self._respond(scope, receive, named, request_id)
        except Refused as refused:
            response = refused.response
        except QServeError as exc:
            response = local_error_response(exc)
        except KeyRefused as exc:
            response = _key_refused(exc)
        except ClientLeft:
            return
        reach("respond")
        if isinstance(response, Stream):
            await self._write_stream(response, scope["method"], request_id, receive, send)
        elif isinstance(response, EventStream):
            await response.write(send, receive, scope["method"], request_id)
        else:
            await send_response(send, response, scope["method"], request_id)

    async def _respond(
        self, scope: Scope, receive: Receive, named: Named, request_id: str
    ) -> "HttpResponse | Stream | EventStream":
        headers = scope["headers"] if UNUSUAL.isdisjoint(named) else _cleaned(scope["headers"], named)
        path, raw_path = self._full_path(scope)
        if path.startswith("/-/", len(self._root_path)):
            return await self._own_page(scope, path, headers, named, request_id)
        route = self._routes.match(path)
        if self._keys is not None:
            headers = self._keys.check(headers, named, route.deployment if route is not None else "")
        if route is None:
            return _not_found(path)
        scope["state"]["deployment"] = route.deployment
        if _TIMEOUT in named:
            route = _hurried(route, named[_TIMEOUT])
        wish = None if _KEPT.isdisjoint(named) or self._pages is None else _wish(headers)
        body, follows = b"", False
        if b"transfer-encoding" in named or named.get(b"content-length", b"0") != b"0":
            most = self._settings.max_value_bytes if wish is not None else self._settings.out_of_line_bytes
            body, follows = await _read_beginning(receive, named, self._settings, most)
        request = HttpRequest(
            scope["method"],
            path,
            raw_path,
            scope["query_string"],
            headers,
            route.root_path,
            scope["scheme"],
            scope["client"],
            scope["server"],
            scope["http_version"],
            request_id,
            body,
            follows,
        )
        if wish is not None:
            return await self._submit(route, request, wish)
        safe = request.method in SAFE_METHODS or route.idempotent or b"idempotency-key" in named
        if follows:
            outcome = await self._call_with_upload(route, request, receive)
        else:
            outcome = await self._call(route, encode(request), safe, receive)
        if isinstance(outcome, Stream):
            return outcome
        return outcome_response(outcome, request_id, debug=self._settings.debug)

    async def _submit(self, route: Route, request: HttpRequest, wish: Wish) -> HttpResponse:
        most = self._settings.max_value_bytes
        if request.body_follows or len(request.body) > most:
            raise PayloadTooLarge(f"a request that is kept may have {most} bytes (QSERVE_MAX_VALUE_BYTES)")
        assert self._pages is not None
        return await self._pages.submit(route, request, wish, self._root_path)

    def _full_path(self, scope: Scope) -> tuple[str, bytes]:
        path, raw_path, root = scope["path"], scope["raw_path"], self._root_path
        if root and path != root and not path.startswith(root + "/"):
            # A proxy in front took the prefix away.
            return root + path, root.encode() + raw_path
        return path, raw_path

    def _prepare(
        self, route: Route, payload: bytes, safe: bool, kind: int = HTTP
    ) -> "tuple[PendingCall, asyncio.Future[Answer]]":
        # Asking for the running loop is a system call (it compares process ids), 4 % of a request: once is enough.
        loop = self._loop = self._loop or asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()

        def on_outcome(outcome: Outcome) -> None:
            if not future.done():
                future.set_result(outcome)

        pending = self._calls.prepare(
            route.deployment,
            kind=kind,
            method="",
            payload=payload,
            timeout_s=route.timeout_s,
            safe=safe,
            on_outcome=on_outcome,
        )

        def on_stream(pending: PendingCall, channel: Channel) -> None:
            if not future.done():
                future.set_result(Stream(channel, pending))

        pending.on_stream = on_stream
        pending.is_strict = route.is_hurried
        return pending, future

    async def _call(self, route: Route, payload: bytes, safe: bool, receive: Receive) -> "Outcome | Stream":
        """Puts a call and waits for its reply, for the beginning of a streamed one, or until its client leaves."""
        pending, future = self._prepare(route, payload, safe)
        self._calls.put(pending)
        answer = None
        self._departures.watch(future, receive)
        try:
            answer = await future
        finally:
            self._departures.forget(future)
            if answer is None:
                self._calls.cancel(pending)
        if answer is None:
            raise ClientLeft
        return answer

    async def _call_with_upload(self, route: Route, request: HttpRequest, receive: Receive) -> "Outcome | Stream":
        """Like `_call`, with a body that is sent on as it comes in; a half-read body cannot be run again."""
        pending, future = self._prepare(route, encode(request), safe=False)

        def on_end(error: QServeError | None) -> None:
            if not future.done():
                future.set_result(error)

        upload = Upload(
            self._calls.open_channel(pending),
            receive,
            sent=len(request.body),
            limit=self._settings.max_body_bytes,
            on_end=on_end,
        )
        self._calls.put(pending)
        upload.start()
        answer = None
        try:
            answer = await future
        finally:
            if isinstance(answer, Stream):
                answer.upload = upload
            else:
                await upload.stop()
                self._calls.cancel(pending)  # without effect where there is an outcome
        if answer is None:
            raise ClientLeft
        return answer

    async def _serve_websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        named = dict(scope["headers"])
        request_id = self._request_id(named.get(b"x-request-id"))
        noted = scope.setdefault("state", {})
        noted["request_id"] = request_id
        await receive()  # "websocket.connect"
        path, raw_path = self._full_path(scope)
        route = self._routes.match(path)
        headers = [pair for pair in scope["headers"] if pair[0] not in SPOOFED]
        try:
            if self._keys is not None:
                headers = self._keys.check(headers, named, route.deployment if route is not None else "")
        except KeyRefused as exc:
            await deny(send, _key_refused(exc), request_id)
            return
        if route is None:
            await deny(send, _not_found(path), request_id)
            return
        noted["deployment"] = route.deployment
        request = HttpRequest(
            *("GET", path, raw_path, scope["query_string"], headers, route.root_path, scope["scheme"]),
            *(scope["client"], scope["server"], scope["http_version"], request_id, b""),
            subprotocols=tuple(scope["subprotocols"]),
        )
        pending, outcome = self._prepare(route, encode(request), safe=False, kind=WEBSOCKET)
        pending.on_stream = None
        bridge = WebSocketBridge(self._calls.open_channel(pending), receive, send, request_id)
        self._calls.put(pending)
        try:
            await bridge.run()
        except QServeError:  # before anything was accepted: the call's outcome says why
            refusal = outcome.result() if outcome.done() else None
            error = StreamBroken("the replica is gone") if refusal is None or isinstance(refusal, Stream) else refusal
            await deny(send, outcome_response(error, request_id, debug=self._settings.debug), request_id)
        finally:
            self._calls.cancel(pending)

    async def _write_stream(self, stream: "Stream", method: str, request_id: str, receive: Receive, send: Send) -> None:
        try:
            listen = receive if stream.upload is None else None
            await stream_response(send, listen, stream.channel, method, request_id)
        finally:
            if stream.upload is not None:
                await stream.upload.stop()
            self._calls.cancel(stream.pending)  # without effect where it has ended

    async def _own_page(
        self, scope: Scope, path: str, headers: Headers, named: Named, request_id: str
    ) -> HttpResponse | EventStream:
        name = path[len(self._root_path) :]
        if name == "/-/healthz":
            return text_response(200, "success")
        if self._keys is not None:
            self._keys.check(headers, named, "")
        if name == "/-/routes":
            return json_response(self.routes)
        if name.startswith(PATH) and self._pages is not None:
            return await self._pages.page(scope, name, request_id)
        return _not_found(path)

    def _request_id(self, asked: bytes | None) -> str:
        if asked is not None and _is_request_id(asked):
            return asked.decode("ascii")
        return next(self._ids)


def _cleaned(headers: Headers, named: Named) -> Headers:
    try:
        return end_to_end(headers)
    except ValueError as exc:
        raise Refused(text_response(400, f"Bad request: {exc}.")) from exc


def _hurried(route: Route, asked: bytes) -> Route:
    """The route with the deadline that the client asks for, which can only be earlier than the deployment's."""
    if _is_milliseconds(asked) is None or int(asked) == 0:
        raise Refused(text_response(400, "Bad request: X-Request-Timeout-Ms is not a number of milliseconds."))
    return route._replace(timeout_s=min(route.timeout_s, int(asked) / 1000), is_hurried=True)


def _wish(headers: Headers) -> Wish | None:
    try:
        return wish_of(headers)
    except ValueError as exc:
        raise Refused(text_response(400, f"Bad request: {exc}.")) from exc


async def _read_beginning(receive: Receive, named: Named, settings: Settings, most: int) -> tuple[bytes, bool]:
    """The body, or its beginning and True where it has more than `most` bytes, too many to be put on the queue."""
    if int(named.get(b"content-length", b"0")) > settings.max_body_bytes:
        raise body_too_large(settings.max_body_bytes)
    parts: list[bytes] = []
    size = 0
    more = True
    while more and size <= most:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
    if size > settings.max_body_bytes:
        raise body_too_large(settings.max_body_bytes)
    return parts[0] if len(parts) == 1 else b"".join(parts), more


def _key_refused(exc: KeyRefused) -> HttpResponse:
    challenge = ((b"www-authenticate", b"Bearer"),) if exc.status == 401 else ()
    return text_response(exc.status, f"Refused: {exc}.", *challenge)


def _not_found(path: str) -> HttpResponse:
    return text_response(404, f"Path '{path}' not found. Please ping http://.../-/routes for route table.")
