"""The gateway as an ASGI application: one request, from its path to its response."""

import asyncio
import re
from collections.abc import Awaitable, Collection, Iterable, Sequence
from time import monotonic

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from qserve.calls.client import Client
from qserve.errors import BrokerUnavailable, PayloadTooLarge, QServeError, StreamBroken
from qserve.hooks import GatewayHook
from qserve.settings import Settings
from qserve.wire.messages import MODEL, WEBSOCKET, HttpRequest, HttpResponse, encode
from qserve.wire.spec import DeploymentSpec
from qserve_gateway.api_keys import ApiKeys
from qserve_gateway.bodies.large_bodies import LargeResponse
from qserve_gateway.bodies.streaming import ClientDisconnected, keeping, read_beginning, until_it_pauses
from qserve_gateway.direct_calls import DirectCall, HookedDirectCall
from qserve_gateway.door.body_protocol import connection_of
from qserve_gateway.door.direct import DirectApp, DirectProtocol, DirectRequest
from qserve_gateway.door.limits import request_ids
from qserve_gateway.durable.durable_events import EventStream
from qserve_gateway.durable.durable_pages import DurablePages
from qserve_gateway.durable.durable_requests import PATH, DurableRequests, Preference, preference_of
from qserve_gateway.front_page import front_page
from qserve_gateway.headers import SPOOFED, UNUSUAL, Headers, end_to_end
from qserve_gateway.http_calls import Answered, HttpCalls, StreamedResponse
from qserve_gateway.middlewares import wrapped
from qserve_gateway.request_hooks import RequestHooks
from qserve_gateway.respond import (
    Refused,
    about_to_respond,
    bad_request,
    json_response,
    leaving_response,
    local_error_response,
    outcome_response,
    send_response,
    text_response,
)
from qserve_gateway.routes import Route, RouteTable
from qserve_gateway.websocket import WebSocketBridge, deny

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
"""A request with one of these may be run again after its replica died."""

_DURABLE = frozenset({b"prefer", b"idempotency-key"})
"""A request with one of these may ask to be a durable call."""

_NOT_DIRECT = _DURABLE | {b"transfer-encoding"}
"""Headers of requests that may take more than one step to answer."""

Named = dict[bytes, bytes]
"""Headers by lower-case name, the last of each; for looking, not for handing on."""

_LARGEST_DURABLE = 64 * 1024 * 1024
"""Bytes of the body of a request that becomes a durable call; the gateway has it in memory as a whole."""
_TIMEOUT = b"x-request-timeout-ms"
_TIMEOUT_S = b"x-request-timeout-seconds"
_SHORTEST_S = 0.001
_MODEL = b"serve_multiplexed_model_id"
_OUTLIVES_CLIENT = b"x-request-disconnect-disabled"
_TRUE = frozenset({b"?1", b"1", b"true"})
_MEANT_FOR_US = frozenset({_TIMEOUT, _TIMEOUT_S, _MODEL, _OUTLIVES_CLIENT})
"""Headers that change how a request is served; the last two are Ray Serve's."""
_is_milliseconds = re.compile(rb"[0-9]{1,9}").fullmatch
_is_seconds = re.compile(rb"[0-9]{1,6}(\.[0-9]{1,6})?").fullmatch
_is_request_id = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}").fullmatch


Response = HttpResponse | StreamedResponse | LargeResponse | EventStream


class Gateway(DirectApp):
    """The ASGI application of the public listener.

    Args:
        client: Puts the calls.
        settings: Limits and defaults.
        keys: Who may come in; None for everybody.
        durable: Submits durable calls; None where there are none.
        pages: Shows durable calls.
        hooks: The users' code around requests; empty for none.
        leaving: Set when no further requests are to be sent here; None if that is nobody else's business.
    """

    def __init__(
        self,
        client: Client,
        settings: Settings,
        keys: ApiKeys | None = None,
        durable: DurableRequests | None = None,
        pages: DurablePages | None = None,
        hooks: Sequence[GatewayHook] = (),
        leaving: asyncio.Event | None = None,
    ) -> None:
        self._client = client
        self.leaving = leaving or asyncio.Event()
        self._calls = HttpCalls(client, settings.max_body_bytes, self.leaving)
        self._settings = settings
        self._largest_durable = min(settings.max_value_bytes, _LARGEST_DURABLE)
        self._keys = keys
        self._durable = durable
        self._pages = pages
        self._specs: tuple[DeploymentSpec, ...] = ()
        self._asleep: Collection[str] = ()
        self._root_path = ""
        self._routes = RouteTable()
        self._knows_routes = False
        # Chosen once: a request that no hook sees pays for one comparison.
        self._hooks = RequestHooks(hooks) if hooks else None
        self._entry: ASGIApp = self._hooks.around(self.serve) if self._hooks is not None else self.serve
        self._stack = self._entry
        self._is_bare = True
        """Whether there are no middlewares around `serve`."""
        self._ids = request_ids()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        # Not async: without middlewares the server awaits `serve` itself, a frame less per request.
        return self._stack(scope, receive, send)

    @property
    def routes(self) -> dict[str, str]:
        """Route prefix -> deployment name, as `/-/routes` shows it."""
        return self._routes.names

    def use_deployments(self, specs: Iterable[DeploymentSpec], asleep: Collection[str] = ()) -> None:
        """Route requests to these deployments from now on; those whose names are in `asleep` have no replicas."""
        self._specs, self._asleep = tuple(specs), asleep
        self._knows_routes = True
        self._routes = RouteTable(
            self._specs, root_path=self._root_path, timeout_s=self._settings.http_timeout_s, asleep=asleep
        )

    def use_http_options(self, root_path: str, middlewares: Iterable[Middleware]) -> None:
        """Live under `root_path` and wrap everything in the middlewares, the first one outermost.

        Raises:
            ConfigurationError: A middleware refuses its arguments; nothing has changed then.
        """
        self._stack = wrapped(self._entry, tuple(middlewares))
        self._is_bare = self._stack is self._entry
        self._root_path = root_path.rstrip("/")
        self.use_deployments(self._specs, self._asleep)

    def begin(self, scope: Scope, connection: DirectProtocol) -> DirectRequest | None:
        """Put the call of a request that has no body; None for one that is answered in another way than by one call."""
        if not self._is_bare:
            return None
        named = dict(scope["headers"])
        if not _NOT_DIRECT.isdisjoint(named) or named.get(b"content-length", b"0") != b"0":
            return None
        path, raw_path = self._full_path(scope)
        if path.startswith("/-/", len(self._root_path)):
            return None
        try:
            route, headers = self._find_route(scope, path, named)
        except Refused:
            return None
        if route.sleeps:
            return None
        request_id = scope["state"]["request_id"] = self._request_id(named.get(b"x-request-id"))
        method, client, debug = scope["method"], self._client.of(route.deployment), self._settings.debug
        if self._hooks is not None and self._hooks.are_wanted(scope):
            route = self._hooks.before(route, scope, request_id)
            call: DirectCall = HookedDirectCall(
                self._hooks, scope, client, connection, route, method, request_id, debug=debug
            )
        else:
            call = DirectCall(client, connection, route, method, request_id, debug=debug)
        request = _request(scope, path, raw_path, headers, route, request_id)
        call.put(encode(request), safe=method in SAFE_METHODS or route.idempotent)
        return call

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, inside the middlewares."""
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
        except ClientDisconnected:
            return
        except QServeError as exc:
            response = local_error_response(exc)
        except asyncio.CancelledError:
            if not self.leaving.is_set():
                raise
            response = leaving_response()
        about_to_respond()
        if isinstance(response, HttpResponse):
            await send_response(send, response, scope["method"], request_id)
        else:
            await response.write(send, receive, scope["method"], request_id)

    async def _respond(self, scope: Scope, receive: Receive, named: Named, request_id: str) -> Response:
        path, raw_path = self._full_path(scope)
        if path.startswith("/-/", len(self._root_path)):
            return await self._own_page(scope, path, named, request_id)
        route, headers = self._find_route(scope, path, named)
        began = monotonic() if route.sleeps else 0.0
        preference = None if _DURABLE.isdisjoint(named) or self._durable is None else preference_of(scope["headers"])
        if self._hooks is not None:
            route = self._hooks.before(route, scope, request_id, durable=preference is not None)
        safe = scope["method"] in SAFE_METHODS or route.idempotent or b"idempotency-key" in named
        described = (scope, path, raw_path, headers, route, request_id)
        length = int(named.get(b"content-length", b"0"))
        if length > self._settings.out_of_line_bytes and preference is None:
            large = self._calls.large_body(route, _request(*described), length)
            if large is not None:
                connection = connection_of(scope, receive)
                answer = await self._calls.answer_large(route, large, safe, keeping(receive), connection)
                return self._response(answer, route, request_id)
        body, follows = b"", False
        if length or b"transfer-encoding" in named:
            is_live = preference is None and not length
            receive = keeping(receive) if is_live else receive
            body, follows = await read_beginning(
                until_it_pauses(receive) if is_live else receive,
                declared=length,
                most=self._settings.out_of_line_bytes if preference is None else self._largest_durable,
                limit=self._settings.max_body_bytes,
            )
        request = _request(*described, body, follows)
        if preference is not None:
            return await self._submit(route, request, preference)
        if follows:
            answer = await self._calls.answer_upload(route, encode(request), len(body), receive)
        else:
            answer = await self._calls.answer(route, encode(request), safe, receive)
        response = self._response(answer, route, request_id)
        if route.sleeps and isinstance(response, HttpResponse):
            return _with_wait(response, monotonic() - began)
        return response

    def _response(self, answer: Answered, route: Route, request_id: str) -> Response:
        if isinstance(answer, StreamedResponse | LargeResponse):
            return answer
        return outcome_response(answer, request_id, debug=self._settings.debug, when_full=route.when_full)

    def _find_route(self, scope: Scope, path: str, named: Named) -> tuple[Route, Headers]:
        """Find where a request goes, and with which headers.

        Raises:
            Refused: It goes nowhere.
        """
        headers = scope["headers"] if UNUSUAL.isdisjoint(named) else _cleaned(scope)
        route = self._routes.match(path)
        if self._keys is not None:
            headers = self._keys.check(headers, named, route.deployment if route is not None else "")
        if route is None:
            raise Refused(self._page_without_deployment(scope, path, named))
        scope["state"]["deployment"] = route.deployment
        if not _MEANT_FOR_US.isdisjoint(named):
            route = _as_asked(route, named)
        return route, headers

    async def _submit(self, route: Route, request: HttpRequest, preference: Preference) -> HttpResponse:
        most = self._largest_durable
        if request.body_follows or len(request.body) > most:
            raise PayloadTooLarge(
                f"the body of a request that becomes a durable call may have {most} bytes (QSERVE_MAX_VALUE_BYTES)"
            )
        assert self._durable is not None
        return await self._durable.submit(route, request, preference, self._root_path)

    def _full_path(self, scope: Scope) -> tuple[str, bytes]:
        path, raw_path, root = scope["path"], scope["raw_path"], self._root_path
        if root and path != root and not path.startswith(root + "/"):
            # A proxy in front took the prefix away.
            return root + path, root.encode() + raw_path
        return path, raw_path

    async def _serve_websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        named = dict(scope["headers"])
        request_id = self._request_id(named.get(b"x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        await receive()  # "websocket.connect"
        path, raw_path = self._full_path(scope)
        try:
            if path.startswith("/-/", len(self._root_path)):
                raise Refused(_not_found(path))
            route, headers = self._find_route(scope, path, named)
        except Refused as refused:
            await deny(send, refused.response, request_id)
            return
        if self._hooks is not None:
            route = self._hooks.before(route, scope, request_id)
        request = HttpRequest(
            *("GET", path, raw_path, scope["query_string"], headers, route.root_path, scope["scheme"]),
            *(scope["client"], scope["server"], scope["http_version"], request_id, b""),
            subprotocols=tuple(scope["subprotocols"]),
        )
        pending, outcome = self._calls.prepare(route, encode(request), safe=False, kind=WEBSOCKET)
        pending.on_stream = None
        client = self._client.of(route.deployment)
        bridge = WebSocketBridge(client.open_channel(pending), receive, send, request_id)
        client.put(pending)
        try:
            await bridge.run()
        except QServeError:  # before anything was accepted: the call's outcome says why
            answer = outcome.result() if outcome.done() else None
            if answer is None or isinstance(answer, StreamedResponse):
                answer = StreamBroken("the replica that had the WebSocket is gone: connect again")
            response = outcome_response(answer, request_id, debug=self._settings.debug, when_full=route.when_full)
            await deny(send, response, request_id)
        except asyncio.CancelledError:
            if not self.leaving.is_set():
                raise
            if not bridge.accepted and not bridge.closed:  # otherwise its client has been told
                await deny(send, leaving_response(), request_id)
        finally:
            client.cancel(pending)

    async def _own_page(self, scope: Scope, path: str, named: Named, request_id: str) -> HttpResponse | EventStream:
        headers = scope["headers"] if UNUSUAL.isdisjoint(named) else _cleaned(scope)
        name = path[len(self._root_path) :]
        if name == "/-/healthz":
            return text_response(200, "success")
        if name == "/-/readyz":
            return self._readiness()
        if self._keys is not None:
            self._keys.check(headers, named, "")
        if name == "/-/routes":
            return json_response(self.routes) if self._knows_routes else _not_known_yet()
        if name.startswith(PATH) and self._pages is not None:
            return await self._pages.page(scope, name, request_id)
        return _not_found(path)

    def _page_without_deployment(self, scope: Scope, path: str, named: Named) -> HttpResponse:
        if not self._knows_routes:
            return _not_known_yet()
        if path in (self._root_path, f"{self._root_path}/") and scope["type"] == "http":
            return front_page(self.routes, self._root_path, named.get(b"accept", b""))
        return _not_found(path)

    def _readiness(self) -> HttpResponse:
        if self.leaving.is_set():
            why = "this gateway is leaving"
        elif not self._knows_routes:
            why = "what is deployed is not known yet"
        elif not self._client.sender.is_open:
            why = "Redis cannot be reached"
        else:
            return text_response(200, "ready")
        return text_response(503, f"not ready: {why}", (b"retry-after", b"1"))

    def _request_id(self, asked: bytes | None) -> str:
        if asked is not None and _is_request_id(asked):
            return asked.decode("ascii")
        return next(self._ids)


def _request(
    scope: Scope,
    path: str,
    raw_path: bytes,
    headers: Headers,
    route: Route,
    request_id: str,
    body: bytes = b"",
    follows: bool = False,
) -> HttpRequest:
    return HttpRequest(
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


def _cleaned(scope: Scope) -> Headers:
    headers: Headers = scope["headers"]
    if scope["type"] == "websocket":  # those of the connection tell its application about the handshake
        return [pair for pair in headers if pair[0] not in SPOOFED]
    try:
        return end_to_end(headers)
    except ValueError as exc:
        raise bad_request(exc) from exc


def _as_asked(route: Route, named: Named) -> Route:
    """The route as the headers of the request want it."""
    if _TIMEOUT in named:
        route = _with_deadline(route, named[_TIMEOUT])
    elif _TIMEOUT_S in named:
        route = _with_deadline(route, _milliseconds(named[_TIMEOUT_S]))
    if _MODEL in named:
        route = route._replace(meta={**route.meta, MODEL: named[_MODEL].decode("latin-1")})
    if named.get(_OUTLIVES_CLIENT) in _TRUE:
        route = route._replace(outlives_client=True)
    return route


def _milliseconds(seconds: bytes) -> bytes:
    if _is_seconds(seconds) is None or float(seconds) < _SHORTEST_S:
        raise bad_request(f"X-Request-Timeout-Seconds is not a number of seconds, {_SHORTEST_S} or more")
    return b"%d" % (float(seconds) * 1000)


def _with_deadline(route: Route, asked: bytes) -> Route:
    """The route with the deadline that the client asks for, which can only be earlier than the deployment's."""
    if _is_milliseconds(asked) is None or int(asked) == 0:
        raise bad_request("X-Request-Timeout-Ms is not a number of milliseconds")
    return route._replace(timeout_s=min(route.timeout_s, int(asked) / 1000), client_sets_deadline=True)


def _with_wait(response: HttpResponse, waited_s: float) -> HttpResponse:
    """The response to a request that found no replica, which says so and for how long it has waited."""
    told = b'wake;desc="no replica, one was started";dur=%d' % (1000 * waited_s)
    return HttpResponse(response.status, [*response.headers, (b"server-timing", told)], response.body)


def _not_found(path: str) -> HttpResponse:
    return text_response(404, f"Path '{path}' not found. Please ping http://.../-/routes for route table.")


def _not_known_yet() -> HttpResponse:
    return local_error_response(BrokerUnavailable("Redis has not answered yet, so what is deployed is not known"))
