"""Calls of requests that are answered without a task: what becomes of the call is written to the connection."""

from functools import partial
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from qserve.calls.client import Client
from qserve.calls.pending import PendingCall
from qserve.errors import QServeError
from qserve.wire.channel import Channel
from qserve.wire.messages import HTTP, HTTP_RESPONSE, HttpResponse, LargeReply, Outcome
from qserve_gateway.bodies.large_bodies import LargeResponse
from qserve_gateway.bodies.streaming import ClientDisconnected
from qserve_gateway.door.direct import DirectProtocol, DirectRequest
from qserve_gateway.http_calls import StreamedResponse
from qserve_gateway.request_hooks import RequestHooks, with_trace
from qserve_gateway.respond import (
    about_to_respond,
    checked,
    leaving_response,
    local_error_response,
    may_have_run,
    outcome_response,
    send_response,
)
from qserve_gateway.routes import Route


class DirectCall(DirectRequest):
    """A call and the connection that waits for its outcome.

    Args:
        connection: Its active request is the one that is to be answered.
    """

    __slots__ = ("_client", "_connection", "_debug", "_method", "_pending", "_request_id", "_route")

    def __init__(
        self, client: Client, connection: DirectProtocol, route: Route, method: str, request_id: str, *, debug: bool
    ) -> None:
        self._client = client
        self._connection: DirectProtocol | None = connection
        self._route = route
        self._method = method
        self._request_id = request_id
        self._debug = debug
        self._pending: PendingCall

    def put(self, payload: bytes, *, safe: bool) -> None:
        """Put the call.

        Args:
            payload: The encoded request.
            safe: It may be run again after its replica died.
        """
        route = self._route
        try:
            self._pending = pending = self._client.prepare(
                route.deployment,
                kind=HTTP,
                method="",
                payload=payload,
                timeout_s=route.timeout_s,
                safe=safe,
                on_outcome=self._on_outcome,
                meta=route.meta,
            )
        except Exception as exc:
            connection, self._connection = self._connection, None
            if connection is not None:
                self._run(connection, _raising(exc))
            return
        pending.on_stream = self._on_stream
        pending.is_strict = route.client_sets_deadline
        self._client.put(pending)

    def leave(self) -> None:
        """Withdraw the call, because its client has left; without effect where the call has ended."""
        self._withdraw()

    def give_up(self) -> None:
        """Withdraw the call, and answer that this gateway leaves."""
        connection = self._withdraw()
        if connection is not None:
            is_safe = self._pending.safe
            self._respond(connection, leaving_response() if is_safe else local_error_response(may_have_run()))

    def _withdraw(self) -> DirectProtocol | None:
        """End the call; return the connection that has waited for it, if it still did."""
        connection, self._connection = self._connection, None
        if connection is not None and not self._route.outlives_client:
            self._client.cancel(self._pending)
        return connection

    def _on_outcome(self, outcome: Outcome) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return  # the client has left, or the response is a stream
        try:
            if type(outcome) is LargeReply and outcome.kind == HTTP_RESPONSE:
                about_to_respond()
                self._run(connection, self._sending(LargeResponse(outcome)))
                return
            try:
                response = outcome_response(
                    outcome, self._request_id, debug=self._debug, when_full=self._route.when_full
                )
            except QServeError as exc:
                response = local_error_response(exc)
            about_to_respond()
            self._respond(connection, response)
        except Exception as exc:
            self._run(connection, _raising(exc))

    def _on_stream(self, pending: PendingCall, channel: Channel) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            about_to_respond()
            self._run(connection, self._sending(StreamedResponse(channel, partial(self._client.cancel, pending))))

    def _respond(self, connection: DirectProtocol, response: HttpResponse) -> None:
        if not connection.respond(*checked(response, self._method, self._request_id)):
            self._run(connection, self._sending(response))

    def _run(self, connection: DirectProtocol, app: ASGIApp) -> None:
        connection.run_app(app)

    def _sending(self, response: HttpResponse | StreamedResponse | LargeResponse) -> ASGIApp:
        async def send_it(scope: Scope, receive: Receive, send: Send) -> None:
            if isinstance(response, HttpResponse):
                await send_response(send, response, self._method, self._request_id)
            else:
                await response.write(send, receive, self._method, self._request_id)

        return send_it


class HookedDirectCall(DirectCall):
    """A direct call with hooks around it, which have been told that it is about to be put.

    Args:
        hooks: Tell the hooks how it has ended.
        scope: The scope of its request.
    """

    __slots__ = ("_hooks", "_scope")

    def __init__(self, hooks: RequestHooks, scope: Scope, *call: Any, debug: bool) -> None:
        super().__init__(*call, debug=debug)
        self._hooks = hooks
        self._scope = scope

    def leave(self) -> None:
        """Withdraw the call, because its client has left; without effect where the call has ended."""
        if self._withdraw() is not None:
            self._hooks.end(self._scope, 0, ClientDisconnected("the client left before its response was sent"))

    def _respond(self, connection: DirectProtocol, response: HttpResponse) -> None:
        status, headers, body = checked(response, self._method, self._request_id)
        if connection.respond(status, with_trace(headers, self._scope["state"]), body):
            self._hooks.end(self._scope, status)
        else:
            self._run(connection, self._sending(response))

    def _run(self, connection: DirectProtocol, app: ASGIApp) -> None:
        super()._run(connection, self._hooks.around(app))


def _raising(error: BaseException) -> ASGIApp:
    """An application that fails, so that uvicorn logs and answers it as it does every failure."""

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    return fail
