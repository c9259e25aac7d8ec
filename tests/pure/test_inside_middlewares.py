"""What is around the gateway, its middlewares, takes nothing from requests and responses."""

import asyncio
from collections.abc import MutableMapping
from typing import Any, ClassVar

import pytest
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qserve.calls.pending import PendingCall
from qserve.settings import Settings
from qserve.wire.channel import DATA, END, HELLO, Channel, Chunk
from qserve_gateway.bodies.streaming import ResponseCut
from qserve_gateway.door.limits import CLIENT_LEFT
from qserve_gateway.gateway import Gateway
from qserve_gateway.middlewares import wrapped
from tests.pure.test_gateway_app import FakeCalls, spec

START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}


class Through(BaseHTTPMiddleware):
    """Hands everything on, and notes the status of each response."""

    statuses: ClassVar[list[int]] = []

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        Through.statuses.append(response.status_code)
        return response


class Whole(BaseHTTPMiddleware):
    """Answers with the whole body of the response that it got."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response: Any = await call_next(request)
        return PlainTextResponse(b"".join([part async for part in response.body_iterator]))


class Slow:
    """Takes its time after it has got a message, until `passes` is set."""

    def __init__(self, app: ASGIApp, passes: asyncio.Event) -> None:
        self._app = app
        self._passes = passes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_slowly() -> Message:
            message = await receive()
            await self._passes.wait()
            return message

        await self._app(scope, receive_slowly, send)


def http_scope() -> MutableMapping[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": "/hello",
        "raw_path": b"/hello",
        "query_string": b"",
        "headers": [(b"transfer-encoding", b"chunked")],
        "scheme": "http",
        "client": None,
        "server": None,
        "http_version": "1.1",
        "state": {},
    }


async def left() -> Message:
    return {"type": "http.disconnect"}


async def answered(app: ASGIApp, *middlewares: Any) -> list[Message]:
    """What is sent to the client of a request by an application inside of middlewares."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = http_scope()
    try:
        await wrapped(app, [Middleware(each) for each in middlewares])(scope, left, send)
    except ResponseCut:
        sent.append({"type": "cut"})
    assert scope["state"] == {}
    return sent


@pytest.mark.parametrize("more", [[], [GZipMiddleware]], ids=["alone", "above another"])
@pytest.mark.parametrize("has_begun", [False, True], ids=["no response", "half a response"])
async def test_a_client_that_leaves_is_no_error_to_a_middleware(has_begun: bool, more: list[Any]) -> None:
    Through.statuses.clear()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if has_begun:
            await send(START)

    await answered(app, Through, *more)

    assert Through.statuses == [200 if has_begun else CLIENT_LEFT]


@pytest.mark.parametrize("middlewares", [[Through], [GZipMiddleware, Through], [Through, GZipMiddleware], [Whole]])
async def test_a_response_that_was_cut_does_not_look_whole(middlewares: list[Any]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        raise ResponseCut("the rest will never come")

    *sent, last = await answered(app, *middlewares)

    assert last == {"type": "cut"}
    assert all(message.get("more_body", message is sent[0]) for message in sent)


async def test_without_middlewares_there_is_nothing_around_it() -> None:
    assert wrapped(left, []) is left  # type: ignore[arg-type, comparison-overlap]


class Uploads(FakeCalls):
    """Its replica reads the body of each request to the end, and answers then."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = lambda request: None
        self.read: list[bytes] = []
        self.has_all = asyncio.Event()

    def open_channel(self, pending: PendingCall) -> Channel:
        def transmit(_peer: str, chunk: Chunk) -> None:
            if chunk.kind == DATA:
                self.read.append(chunk.data)
            elif chunk.kind == END:
                self.has_all.set()

        pending.channel = Channel("gateway", transmit)
        return pending.channel

    def put(self, pending: PendingCall) -> None:
        super().put(pending)
        assert pending.channel is not None
        pending.channel.feed(Chunk("replica", HELLO))


async def test_no_part_of_a_body_is_lost_in_a_middleware_that_is_not_waited_for() -> None:
    calls, passes = Uploads(), asyncio.Event()
    gateway = Gateway(calls, Settings())
    gateway.use_deployments([spec("hello")])
    gateway.use_http_options("", [Middleware(Slow, passes=passes)])
    arriving = asyncio.Queue[Message]()
    for part in (b"one", b"two", b"three"):
        arriving.put_nowait({"type": "http.request", "body": part, "more_body": part != b"three"})

    async def send(message: Message) -> None:
        raise AssertionError(message)

    request = asyncio.ensure_future(gateway(http_scope(), arriving.get, send))
    await calls.arrived.wait()
    assert calls.last.request.body == b""
    passes.set()
    await calls.has_all.wait()

    assert calls.read == [b"one", b"two", b"three"]
    request.cancel()
    await asyncio.wait((request,))
