"""What the hooks of a gateway learn of a request: that it begins, and how it has ended."""

from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from qserve.errors import ConfigurationError
from qserve.hooks import GatewayHook, GatewayRequest
from qserve.wire.codec import Codec
from qserve.wire.spec import MiddlewareSpec, Target
from qserve_gateway.bodies.streaming import ClientDisconnected
from qserve_gateway.middlewares import load_middlewares
from qserve_gateway.request_hooks import RequestHooks
from qserve_gateway.routes import Route

ROUTE = Route("Echo", "/echo", 60.0, idempotent=False)


class Noting(GatewayHook):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.notes: list[tuple[Any, ...]] = []

    def before(self, request: GatewayRequest) -> str:
        self.notes.append(("before", request.deployment, request.request_id, request.durable))
        request.meta["seen"] = "yes"
        return "state"

    def after(self, request: GatewayRequest, state: Any, status: int) -> None:
        self.notes.append(("after", state, status))

    def error(self, request: GatewayRequest, state: Any, error: BaseException) -> None:
        self.notes.append(("error", state, error))


async def served(*messages: Message, raises: BaseException | None = None, begins: bool = True) -> list[Any]:
    """What a hook notes of a request that is answered with these messages."""
    hook = Noting()
    hooks, scope = RequestHooks([hook]), {"type": "http", "state": {}}

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if begins:
            route = hooks.before(ROUTE, scope, "id-1", durable=True)
            assert route.meta == {"seen": "yes"}
        for message in messages:
            await send(message)
        if raises is not None:
            raise raises

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None: ...

    await hooks.around(serve)(scope, receive, send)
    assert scope["state"] == {}
    return hook.notes


START: Message = {"type": "http.response.start", "status": 201, "headers": []}
PART: Message = {"type": "http.response.body", "body": b"a", "more_body": True}
END: Message = {"type": "http.response.body", "body": b"b"}


async def test_a_whole_response_ends_a_request_well() -> None:
    assert await served(START, PART, END) == [("before", "Echo", "id-1", True), ("after", "state", 201)]


async def test_a_response_that_breaks_off_is_the_clients_doing() -> None:
    _, (what, state, error) = await served(START, PART)
    assert (what, state, type(error)) == ("error", "state", ClientDisconnected)


async def test_an_error_goes_on_after_the_hooks_have_heard_of_it() -> None:
    with pytest.raises(ZeroDivisionError):
        await served(START, raises=ZeroDivisionError())


@pytest.mark.parametrize(
    ("messages", "status"),
    [
        ([{"type": "websocket.accept"}, {"type": "websocket.close"}], 101),
        ([{"type": "websocket.close"}], 403),
        ([{"type": "websocket.http.response.start", "status": 401}, {"type": "websocket.http.response.body"}], 401),
    ],
    ids=["accepted", "closed", "denied"],
)
async def test_a_websocket_ends_with_the_status_of_its_handshake(messages: list[Message], status: int) -> None:
    assert (await served(*messages))[-1] == ("after", "state", status)


async def test_what_belongs_to_no_deployment_is_none_of_their_business() -> None:
    assert await served(START, END, begins=False) == []


@pytest.mark.parametrize(
    ("path", "arguments", "text"),
    [("sys:path", b"", "'sys:path' is not a class"), ("builtins:dict", b"\xc1", "the arguments of middleware")],
)
def test_a_middleware_that_cannot_be_made_is_named(path: str, arguments: bytes, text: str) -> None:
    codec = Codec(allow_pickle=False, max_bytes=100)
    with pytest.raises(ConfigurationError, match=text):
        load_middlewares([MiddlewareSpec(Target(path), arguments)], codec)
