"""The users' hooks around requests."""

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qserve.hooks import GatewayHook, GatewayRequest, HookChain, checked_meta
from qserve_gateway.bodies.streaming import ClientDisconnected
from qserve_gateway.headers import Headers
from qserve_gateway.routes import Route

_STATE = "hooks"
"""Where a request's scope keeps what the hooks have been told, for `after` and `error`."""


class RequestHooks:
    """Runs the hooks of a gateway around those of its requests that belong to a deployment.

    Args:
        hooks: In the order in which they see a request.
    """

    def __init__(self, hooks: Sequence[GatewayHook]) -> None:
        self._choose = HookChain(hooks).choose

    def are_wanted(self, scope: Scope) -> bool:
        """Decide, once for each request, whether hooks are run around it."""
        chain = self._choose(scope)
        if chain is None:
            return False
        scope["state"][_STATE] = chain
        return True

    def before(self, route: Route, scope: Scope, request_id: str, *, durable: bool = False) -> Route:
        """Tell the hooks that a request is about to be put on a queue.

        Returns:
            The route of its call, with the meta that the hooks add.
        """
        chain = scope["state"].get(_STATE)
        if chain is None:
            return route
        prefix = route.root_path or "/"
        request = GatewayRequest(route.deployment, request_id, scope, durable, route_prefix=prefix)
        scope["state"][_STATE] = chain, request, chain.before(request)
        return route._replace(meta=checked_meta(request.meta))

    def end(self, scope: Scope, status: int, error: BaseException | None = None) -> None:
        """Tell the hooks how a request has ended.

        Args:
            status: Of the response.
            error: Why no whole response was sent.
        """
        told = scope["state"].pop(_STATE)
        if isinstance(told, HookChain):
            return  # it belongs to no deployment
        chain, request, states = told
        if error is None:
            chain.after(request, states, status)
        else:
            chain.error(request, states, error)

    def around(self, serve: ASGIApp) -> ASGIApp:
        """Make an application that answers requests as `serve` does, and tells the hooks how each has ended."""

        async def serve_with_hooks(scope: Scope, receive: Receive, send: Send) -> None:
            response = _Response(send, scope["state"])
            try:
                await serve(scope, receive, response.send)
            except BaseException as exc:
                self.end(scope, response.status, exc)
                raise
            gone = None if response.is_whole else ClientDisconnected("the client left before its response was sent")
            self.end(scope, response.status, gone)

        def serve_as_chosen(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
            # Not async: a request that no hook wants has no frame more.
            if _STATE in scope.setdefault("state", {}) or self.are_wanted(scope):
                return serve_with_hooks(scope, receive, send)
            return serve(scope, receive, send)

        return serve_as_chosen


class _Response:
    """What has been sent of a response."""

    def __init__(self, send: Send, state: Mapping[str, Any]) -> None:
        self._send = send
        self._state = state
        self.status = 0
        self.is_whole = False

    async def send(self, message: Message) -> None:
        kind: Any = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
            message = {**message, "headers": with_trace(list(message.get("headers", ())), self._state)}
        elif kind == "websocket.accept":
            self.status = 101
            self.is_whole = True
        await self._send(message)
        if kind in ("http.response.body", "websocket.http.response.body") and not message.get("more_body", False):
            self.is_whole = True
        elif kind == "websocket.close" and not self.status:
            self.status, self.is_whole = 403, True  # what the server answers to a handshake that is not accepted


def with_trace(headers: Headers, state: Mapping[str, Any]) -> Headers:
    """The headers of a response, with the name of its trace, as W3C Trace Context 2 has it."""
    told = state.get("traceresponse")
    if told is None or any(name.lower() == b"traceresponse" for name, _ in headers):
        return headers
    return [*headers, (b"traceresponse", told.encode())]
