"""The gateway as an ASGI application, with a queue that answers as each test says."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message

from qserve.calls.client import Client
from qserve.calls.pending import PendingCall
from qserve.errors import (
    BackPressureError,
    CallCancelled,
    DeploymentNotFound,
    DeploymentUnavailable,
    GetTimeoutError,
    PayloadTooLarge,
    ReplicaDied,
)
from qserve.settings import Settings
from qserve.wire.channel import Channel
from qserve.wire.messages import (
    ERROR,
    HTTP,
    HTTP_RESPONSE,
    MODEL,
    NO_META,
    VALUE,
    WEBSOCKET,
    ErrorInfo,
    HttpRequest,
    HttpResponse,
    Outcome,
    Reply,
    decode_http_request,
    encode,
)
from qserve.wire.options import Backpressure
from qserve.wire.spec import DeploymentSpec, Target
from qserve_gateway.gateway import Gateway
from tests.support.slowness import patience

Answer = Callable[[HttpRequest], HttpResponse | ErrorInfo | Exception | bytes | None]


@dataclass(frozen=True)
class Put:
    """What the gateway put on a queue."""

    deployment: str
    request: HttpRequest
    timeout_s: float
    safe: bool
    meta: Mapping[str, str]


class FakeCalls(Client):
    """Stands for the client: records each call and answers it at the next tick, or never where `answer` gives None."""

    def __init__(self) -> None:
        super().__init__(Settings())
        self.answer: Answer = lambda request: ok(request.method.encode())
        self.puts: list[Put] = []
        self.cancelled: list[str] = []
        self.arrived = asyncio.Event()
        self.withdrawn = asyncio.Event()
        self._fake_numbers = count()

    def prepare(
        self,
        deployment: str,
        *,
        kind: int,
        method: str,
        payload: Any,
        timeout_s: float,
        safe: bool,
        on_outcome: Callable[[Outcome], None],
        meta: Mapping[str, str] = NO_META,
    ) -> PendingCall:
        assert (kind in (HTTP, WEBSOCKET), method) == (True, "")
        self.puts.append(Put(deployment, decode_http_request(payload), timeout_s, safe, meta))
        return PendingCall(f"call{next(self._fake_numbers)}", deployment, safe, b"", None, 0.0, on_outcome)

    def open_channel(self, pending: PendingCall) -> Channel:
        pending.channel = Channel("gateway", lambda _peer, _chunk: None)
        return pending.channel

    def put(self, pending: PendingCall) -> None:
        self.last_put = pending
        self.arrived.set()
        answer = self.answer(self.puts[-1].request)
        if answer is not None:
            asyncio.get_running_loop().call_soon(self._settle, pending, outcome(answer))

    @staticmethod
    def _settle(pending: PendingCall, outcome: Outcome) -> None:
        if pending.channel is not None:
            pending.end_channel(outcome)
        pending.on_outcome(outcome)

    def cancel(self, pending: PendingCall) -> None:
        self.cancelled.append(pending.id)
        self.withdrawn.set()
        pending.on_outcome(CallCancelled("the call was cancelled"))

    @property
    def last(self) -> Put:
        return self.puts[-1]


def outcome(answer: HttpResponse | ErrorInfo | Exception | bytes) -> Outcome:
    if isinstance(answer, bytes):
        return Reply("id", "me", VALUE, answer)
    if isinstance(answer, HttpResponse):
        return Reply("id", "me", HTTP_RESPONSE, encode(answer))
    if isinstance(answer, ErrorInfo):
        return Reply("id", "me", ERROR, encode(answer))
    assert not isinstance(answer, Reply)
    return answer  # type: ignore[return-value]


def ok(body: bytes = b"ok", *headers: tuple[bytes, bytes]) -> HttpResponse:
    return HttpResponse(200, [(b"content-type", b"text/plain"), *headers], body)


def spec(name: str, route: str | None = "", **options: Any) -> DeploymentSpec:
    prefix = f"/{name}" if route == "" else route
    return DeploymentSpec(name=name, target=Target("module:name"), revision="1", route_prefix=prefix, **options)


@pytest.fixture
def calls() -> FakeCalls:
    return FakeCalls()


@pytest.fixture
def settings() -> Settings:
    return Settings(http_timeout_s=30, max_body_bytes=1000)


@pytest.fixture
def gateway(calls: FakeCalls, settings: Settings) -> Gateway:
    gateway = Gateway(calls, settings)
    gateway.use_deployments([spec("hello")])
    return gateway


@pytest.fixture
async def http(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(gateway, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


# Routes


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/hello", "hello"),
        ("/hello/", "hello"),
        ("/hello/a", "hello"),
        ("/hello/a/b", "deep"),
        ("/hello/a/b/c/d", "deep"),
        ("/hello/a/bc", "hello"),
        ("/hellos", "root"),
        ("/", "root"),
        ("//hello", "root"),
    ],
)
async def test_the_longest_prefix_of_whole_segments_wins(
    gateway: Gateway, http: httpx.AsyncClient, calls: FakeCalls, path: str, name: str
) -> None:
    gateway.use_deployments([spec("hello"), spec("deep", "/hello/a/b"), spec("root", "/"), spec("hidden", None)])
    response = await http.get(httpx.URL("http://test", path=path))
    assert response.status_code == 200
    assert calls.last.deployment == name
    assert calls.last.request.path == path


async def test_an_unknown_path_is_404_and_names_the_route_table(http: httpx.AsyncClient, calls: FakeCalls) -> None:
    response = await http.get("/hellos")
    assert response.status_code == 404
    assert response.text == "Path '/hellos' not found. Please ping http://.../-/routes for route table."
    assert calls.puts == []


async def test_routes_shows_exactly_the_live_set(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.use_deployments([])
    assert (await http.get("/-/routes")).json() == {}
    gateway.use_deployments([spec("hello"), spec("root", "/"), spec("hidden", None)])
    response = await http.get("/-/routes")
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {"/hello": "hello", "/": "root"}


async def test_the_root_has_a_page_unless_a_deployment_owns_it(gateway: Gateway, http: httpx.AsyncClient) -> None:
    page = await http.get("/", headers={"accept": "text/html,*/*"})
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert '<a href="/hello">/hello</a> hello' in page.text
    assert "/hello  hello" in (await http.get("/")).text
    gateway.use_http_options("/serve", [])
    assert "/serve/hello" in (await http.get("/serve/")).text
    gateway.use_deployments([])
    assert "Nothing is deployed" in (await http.get("/")).text


async def test_names_on_the_page_of_the_root_are_text(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.use_deployments([spec("x", '/"><script>')])
    page = (await http.get("/", headers={"accept": "text/html"})).text
    assert "<script>" not in page


async def test_readyz_says_why_a_gateway_is_not_ready(calls: FakeCalls, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = Gateway(calls, Settings())
    transport = httpx.ASGITransport(app=gateway)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:

        async def told() -> tuple[int, str]:
            answer = await http.get("/-/readyz")
            return answer.status_code, answer.text

        assert await told() == (503, "not ready: what is deployed is not known yet")
        gateway.use_deployments([])
        assert await told() == (503, "not ready: Redis cannot be reached")
        monkeypatch.setattr(type(calls), "sender", SimpleNamespace(is_open=True))
        assert await told() == (200, "ready")
        gateway.leaving.set()
        assert await told() == (503, "not ready: this gateway is leaving")
        assert (await http.get("/-/healthz")).status_code == 200


async def test_healthz_answers_without_any_deployment(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.use_deployments([])
    assert (await http.get("/-/healthz")).status_code == 200


async def test_paths_of_our_own_never_reach_a_root_deployment(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.use_deployments([spec("root", "/")])
    assert (await http.get("/-/nothing")).status_code == 404


async def test_a_path_of_many_slashes_is_matched_in_no_time(gateway: Gateway, http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(patience(1)):
        url = httpx.URL("http://test", path="/" * 60_000)
        assert (await http.get(url)).status_code == 404


# What the deployment gets


async def test_the_app_gets_the_full_path_and_its_prefix_as_root_path(
    http: httpx.AsyncClient, calls: FakeCalls
) -> None:
    await http.get("/hello/a%20b?x=1&x=2", headers={"x-a": "1"})
    request = calls.last.request
    assert (request.path, request.raw_path, request.root_path) == ("/hello/a b", b"/hello/a%20b", "/hello")
    assert request.query_string == b"x=1&x=2"
    assert (b"x-a", b"1") in request.headers
    assert (request.method, request.scheme, request.http_version) == ("GET", "http", "1.1")


async def test_the_root_route_has_an_empty_root_path(
    gateway: Gateway, http: httpx.AsyncClient, calls: FakeCalls
) -> None:
    gateway.use_deployments([spec("root", "/")])
    await http.get("/x")
    assert calls.last.request.root_path == ""


@pytest.mark.parametrize("path", ["/serve/hello/x", "/hello/x"])
async def test_with_a_root_path_everything_lives_under_it(
    gateway: Gateway, http: httpx.AsyncClient, calls: FakeCalls, path: str
) -> None:
    """Whether or not the proxy in front takes the prefix away."""
    gateway.use_http_options("/serve", [])
    assert (await http.get(path)).status_code == 200
    request = calls.last.request
    assert (request.path, request.raw_path, request.root_path) == ("/serve/hello/x", b"/serve/hello/x", "/serve/hello")
    assert (await http.get("/serve/-/routes")).json() == {"/hello": "hello"}


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PURGE"])
async def test_every_method_may_carry_a_body(http: httpx.AsyncClient, calls: FakeCalls, method: str) -> None:
    response = await http.request(method, "/hello", content=b"body")
    assert response.text == method
    assert calls.last.request.body == b"body"


async def test_a_body_in_pieces_arrives_whole(http: httpx.AsyncClient, calls: FakeCalls) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b"a", b"", b"bc"):
            yield piece

    await http.post("/hello", content=pieces())
    assert calls.last.request.body == b"abc"
    assert b"transfer-encoding" not in dict(calls.last.request.headers)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_413_and_is_not_queued(
    http: httpx.AsyncClient, calls: FakeCalls, chunked: bool
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield bytes(100)

    response = await http.post("/hello", content=pieces() if chunked else bytes(1001))
    assert response.status_code == 413
    assert "1000 bytes" in response.text
    assert calls.puts == []


async def test_headers_of_the_connection_end_at_the_gateway(http: httpx.AsyncClient, calls: FakeCalls) -> None:
    hop = {"connection": "close, x-hop", "x-hop": "1", "te": "trailers", "keep-alive": "5", "upgrade": "h2c"}
    hop |= dict.fromkeys(("proxy-authenticate", "proxy-authorization", "proxy-connection", "trailer"), "x")
    likes = ("x_forwarded_for", "x_forwarded_host", "x_forwarded_port", "x_forwarded_prefix", "x_forwarded_proto")
    spoofed = dict.fromkeys((*likes, "x_real_ip"), "1.2.3.4")
    await http.get("/hello", headers=hop | spoofed | {"x_mine": "stays"})
    passed = dict(calls.last.request.headers)
    assert passed.keys().isdisjoint(name.encode() for name in hop | spoofed)
    assert passed[b"x_mine"] == b"stays"


@pytest.mark.parametrize(
    "name",
    [
        *("Host", "authorization", "Cookie", "content-length", "Forwarded", "X-Real-IP"),
        *(f"X-Forwarded-{what}" for what in ("For", "Host", "Port", "Prefix", "Proto")),
    ],
)
async def test_connection_may_not_remove_headers_that_say_who_asks(
    http: httpx.AsyncClient, calls: FakeCalls, name: str
) -> None:
    response = await http.get("/hello", headers={"connection": f"close, {name}"})
    assert response.status_code == 400
    assert calls.puts == []


@pytest.mark.parametrize(
    ("method", "headers", "idempotent", "safe"),
    [
        *((method, {}, False, True) for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE")),
        *((method, {}, False, False) for method in ("POST", "PATCH", "LOCK")),
        ("POST", {"idempotency-key": "k"}, False, True),
        ("POST", {}, True, True),
    ],
)
async def test_what_may_run_again_after_a_crash(
    gateway: Gateway,
    http: httpx.AsyncClient,
    calls: FakeCalls,
    method: str,
    headers: dict[str, str],
    idempotent: bool,
    safe: bool,
) -> None:
    gateway.use_deployments([spec("hello", idempotent=idempotent)])
    await http.request(method, "/hello", headers=headers)
    assert calls.last.safe is safe


async def test_the_deployments_timeout_wins_over_the_default(
    gateway: Gateway, http: httpx.AsyncClient, calls: FakeCalls
) -> None:
    gateway.use_deployments([spec("hello"), spec("slow", timeout_s=300)])
    await http.get("/hello")
    assert calls.last.timeout_s == 30
    await http.get("/slow")
    assert calls.last.timeout_s == 300


@pytest.mark.parametrize(
    ("asked", "timeout_s"), [("2", 2), ("0.25", 0.25), ("0.001", 0.001), ("60", 30), ("0.0001", 0), ("0", 0), ("-1", 0)]
)
async def test_a_deadline_in_seconds(http: httpx.AsyncClient, calls: FakeCalls, asked: str, timeout_s: float) -> None:
    response = await http.get("/hello", headers={"x-request-timeout-seconds": asked})
    if timeout_s:
        assert calls.last.timeout_s == timeout_s
    else:
        assert (response.status_code, calls.puts) == (400, [])
        assert "X-Request-Timeout-Seconds is not a number of seconds, 0.001 or more" in response.text


@pytest.mark.parametrize(("asked", "timeout_s"), [("2", 0.002), ("60000", 30), ("0", 0), ("-1", 0), ("1e3", 0)])
async def test_a_deadline_in_milliseconds(
    http: httpx.AsyncClient, calls: FakeCalls, asked: str, timeout_s: float
) -> None:
    response = await http.get("/hello", headers={"x-request-timeout-ms": asked})
    if timeout_s:
        assert calls.last.timeout_s == timeout_s
    else:
        assert (response.status_code, calls.puts) == (400, [])
        assert "X-Request-Timeout-Ms is not a number of milliseconds" in response.text


# What the client gets


async def test_each_request_has_an_id_that_both_sides_see(http: httpx.AsyncClient, calls: FakeCalls) -> None:
    first, second = [(await http.get("/hello")).headers["x-request-id"] for _ in range(2)]
    assert first != second
    assert calls.last.request.request_id == second


async def test_a_sane_request_id_of_the_client_is_kept_and_others_are_not(
    http: httpx.AsyncClient, calls: FakeCalls
) -> None:
    response = await http.get("/hello", headers={"x-request-id": "order-17/a"})
    assert response.headers["x-request-id"] == calls.last.request.request_id == "order-17/a"
    for strange in ("", "a b", "x" * 129, "<script>"):
        response = await http.get("/hello", headers={"x-request-id": strange})
        assert response.headers["x-request-id"] not in {"", strange}


async def test_status_headers_and_cookies_arrive_once_and_in_order(http: httpx.AsyncClient, calls: FakeCalls) -> None:
    cookies = [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]
    double = [(b"content-length", b"4"), (b"Content-Length", b"4")]
    hop = [(b"connection", b"close, x-hop"), (b"x-hop", b"1"), (b"transfer-encoding", b"chunked"), (b"date", b"now")]
    calls.answer = lambda request: HttpResponse(418, [*cookies, *double, *hop, (b"X-A", b"1")], b"four")
    response = await http.get("/hello")
    assert (response.status_code, response.content) == (418, b"four")
    assert response.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert response.headers.get_list("content-length") == ["4"]
    assert response.headers["x-a"] == "1"
    assert response.headers.keys().isdisjoint({"connection", "x-hop", "transfer-encoding", "date"})


async def test_an_id_that_the_application_sets_is_the_only_one(http: httpx.AsyncClient, calls: FakeCalls) -> None:
    calls.answer = lambda request: ok(b"four", (b"X-Request-Id", b"its own"))
    assert (await http.get("/hello")).headers.get_list("x-request-id") == ["its own"]


async def test_a_length_that_is_no_number_is_not_told(http: httpx.AsyncClient, calls: FakeCalls) -> None:
    calls.answer = lambda request: ok(b"four", (b"content-length", b"4, 4"))
    assert (await http.head("/hello")).headers.get_list("content-length") == ["4"]


async def test_a_wrong_content_length_is_put_right(http: httpx.AsyncClient, calls: FakeCalls) -> None:
    calls.answer = lambda request: ok(b"four", (b"content-length", b"400"))
    assert (await http.get("/hello")).headers["content-length"] == "4"


async def test_a_head_response_has_the_length_but_not_the_body(http: httpx.AsyncClient, calls: FakeCalls) -> None:
    calls.answer = lambda request: ok(b"four")
    response = await http.head("/hello")
    assert (response.headers["content-length"], response.content) == ("4", b"")
    calls.answer = lambda request: ok(b"", (b"content-length", b"400"))
    assert (await http.head("/hello")).headers["content-length"] == "400"


@pytest.mark.parametrize("status", [204, 304])
async def test_responses_that_have_no_body_get_none(http: httpx.AsyncClient, calls: FakeCalls, status: int) -> None:
    calls.answer = lambda request: HttpResponse(status, [(b"content-length", b"4")], b"four")
    response = await http.get("/hello")
    assert (response.status_code, response.content) == (status, b"")
    assert "content-length" not in response.headers


@pytest.mark.parametrize(
    "header",
    [
        (b"x-a", b"1\r\nset-cookie: admin=1"),
        (b"x-a", b"1\nx: y"),
        (b"x-a", b"\0"),
        (b"x-a: 1\r\nx-b", b"2"),
        (b"", b"nameless"),
        (b"x a", b"1"),
    ],
)
async def test_a_response_that_would_split_is_500(
    http: httpx.AsyncClient, calls: FakeCalls, header: tuple[bytes, bytes]
) -> None:
    calls.answer = lambda request: ok(b"four", header)
    response = await http.get("/hello")
    assert response.status_code == 500
    assert response.headers.keys() <= {"content-type", "content-length", "x-request-id"}


@pytest.mark.parametrize("status", [0, 101, 199, 600])
async def test_a_status_that_is_none_is_500(http: httpx.AsyncClient, calls: FakeCalls, status: int) -> None:
    calls.answer = lambda request: HttpResponse(status, [], b"")
    assert (await http.get("/hello")).status_code == 500


# Errors


def user_error(code: str = "", message: str = "division by zero") -> ErrorInfo:
    return ErrorInfo(code, "ZeroDivisionError", "builtins", message, 'Traceback\n  File "/app/secret.py", line 1')


async def test_a_users_exception_is_500_without_its_traceback(http: httpx.AsyncClient, calls: FakeCalls) -> None:
    calls.answer = lambda request: user_error()
    response = await http.get("/hello", headers={"x-request-id": "r1"})
    assert response.status_code == 500
    assert response.text == "Task Error. ZeroDivisionError. Request r1; the traceback is in the log."
    assert response.headers["content-type"] == "text/plain; charset=utf-8"


async def test_in_debug_mode_the_traceback_is_in_the_body(calls: FakeCalls) -> None:
    gateway = Gateway(calls, Settings(debug=True))
    gateway.use_deployments([spec("hello")])
    calls.answer = lambda request: user_error()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://test") as http:
        response = await http.get("/hello")
    assert response.text.startswith("Task Error. ZeroDivisionError.")
    assert "secret.py" in response.text


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (DeploymentNotFound("no deployment 'hello'"), 404, "DeploymentNotFound: no deployment 'hello'"),
        (PayloadTooLarge("too large"), 413, "PayloadTooLarge: too large"),
        (
            DeploymentUnavailable("no replica of 'Counter' has been seen since 12:03"),
            503,
            "DeploymentUnavailable: no replica of 'Counter' has been seen since 12:03",
        ),
        (GetTimeoutError("too late"), 504, "GetTimeoutError: too late"),
        (ReplicaDied("the replica died"), 502, "ReplicaDied: the replica died"),
        (user_error("ReplicaDied", "the replica died"), 502, "ReplicaDied: the replica died"),
        (user_error("MethodNotFound", "no method 'x'"), 404, "MethodNotFound: no method 'x'"),
        (user_error("PoisonCall", "Task failed with 2 retries: x"), 500, "Task failed with 2 retries: x"),
        (user_error("ResultTooLarge", "17 MiB"), 500, "ResultTooLarge: 17 MiB"),
    ],
)
async def test_errors_have_their_status_and_say_what_happened(
    http: httpx.AsyncClient, calls: FakeCalls, error: Exception | ErrorInfo, status: int, text: str
) -> None:
    calls.answer = lambda request: error
    response = await http.get("/hello")
    assert (response.status_code, response.text) == (status, text)
    assert ("retry-after" in response.headers) is (status == 503)


async def test_a_stream_whose_parts_never_came_is_502(http: httpx.AsyncClient, calls: FakeCalls) -> None:
    calls.answer = lambda request: b"5"  # there were five, and nothing of them has arrived
    response = await http.get("/hello")
    assert response.status_code == 502
    assert "the beginning of the response was lost" in response.text


async def test_a_full_queue_says_when_to_try_again(http: httpx.AsyncClient, calls: FakeCalls) -> None:
    calls.answer = lambda request: BackPressureError("the queue is full", retry_after=2.2)
    response = await http.get("/hello")
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")


# Clients that leave


class Connection:
    """The server's side of one request, for tests that need to be in the middle of it."""

    def __init__(self, gateway: Gateway, *messages: Message, path: str = "/hello", method: str = "GET") -> None:
        self.left = asyncio.Event()
        self.listened_to = asyncio.Event()
        self.sent: list[Message] = []
        self._messages: Iterator[Message] = iter(messages or ({"type": "http.request", "body": b""},))
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"transfer-encoding", b"chunked")] if messages else [],
            "scheme": "http",
            "client": None,
            "server": None,
            "http_version": "1.1",
        }
        self.task = asyncio.ensure_future(gateway(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        message = next(self._messages, None)
        if message is None:
            self.listened_to.set()
            await self.left.wait()
            return {"type": "http.disconnect"}
        return message

    async def _send(self, message: Message) -> None:
        self.sent.append(message)


async def test_the_call_of_a_client_that_leaves_is_withdrawn(gateway: Gateway, calls: FakeCalls) -> None:
    calls.answer = lambda request: None
    connection = Connection(gateway)
    await calls.arrived.wait()
    connection.left.set()
    await calls.withdrawn.wait()
    await connection.task
    assert calls.cancelled == ["call0"]
    assert connection.sent == []


async def test_a_client_that_leaves_while_sending_its_body_puts_no_call(gateway: Gateway, calls: FakeCalls) -> None:
    connection = Connection(
        gateway, {"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}
    )
    await connection.task
    assert (calls.puts, connection.sent) == ([], [])


async def test_a_cancelled_request_withdraws_its_call(gateway: Gateway, calls: FakeCalls) -> None:
    calls.answer = lambda request: None
    connection = Connection(gateway)
    await calls.arrived.wait()
    connection.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connection.task
    assert calls.cancelled == ["call0"]


WHOLE, HALF = [{"type": "http.request", "body": b"x" * 200_000, "more_body": more} for more in (False, True)]


@pytest.mark.parametrize(
    ("method", "messages", "status"),
    [
        ("GET", [], 503),
        ("PUT", [WHOLE], 503),
        ("POST", [WHOLE], 502),
        ("POST", [HALF], 503),
        ("PUT", [HALF, HALF], 502),
    ],
    ids=["safe", "safe with a body", "not safe", "not put yet", "put before its body was whole"],
)
async def test_a_gateway_that_leaves_says_whether_a_request_may_be_sent_again(
    calls: FakeCalls, method: str, messages: list[Message], status: int
) -> None:
    gateway = Gateway(calls, Settings())
    gateway.use_deployments([spec("hello")])
    calls.answer = lambda request: None
    connection = Connection(gateway, *messages, method=method)
    await connection.listened_to.wait()
    gateway.leaving.set()
    connection.task.cancel()
    await connection.task
    assert calls.cancelled == ["call0"] * len(calls.puts)
    start, body = connection.sent
    assert start["status"] == status
    assert (b"retry-after" in dict(start["headers"])) is (status == 503)
    assert (b"Indeterminate: " in body["body"]) is (b"the call may have run" in body["body"]) is (status == 502)


async def test_an_answer_after_a_long_wait_leaves_no_listener_behind(gateway: Gateway, calls: FakeCalls) -> None:
    calls.answer = lambda request: None
    before = asyncio.all_tasks()
    connection = Connection(gateway)
    await connection.listened_to.wait()
    calls.last_put.on_outcome(outcome(ok()))
    await connection.task
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    assert [message["type"] for message in connection.sent] == ["http.response.start", "http.response.body"]
    assert calls.cancelled == []


# WebSockets


class Handshake:
    """The server's side of a WebSocket's handshake."""

    def __init__(self, gateway: Gateway, *headers: tuple[bytes, bytes], path: str = "/hello") -> None:
        self.sent: list[Message] = []
        upgrade = [(b"connection", b"upgrade"), (b"upgrade", b"websocket")]
        self._scope = {
            "type": "websocket",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [*upgrade, *headers],
            "scheme": "ws",
            "client": None,
            "server": None,
            "http_version": "1.1",
            "subprotocols": [],
        }
        self._messages: Iterator[Message] = iter([{"type": "websocket.connect"}])
        self.task = asyncio.ensure_future(gateway(self._scope, self._receive, self._send))

    async def _receive(self) -> Message:
        for message in self._messages:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    async def denial(self) -> tuple[int, dict[bytes, bytes], bytes]:
        """Status, headers and body of the response to it."""
        await self.task
        start, body = self.sent
        assert start["type"] == "websocket.http.response.start"
        return start["status"], dict(start["headers"]), body["body"]


@pytest.mark.parametrize("when_full", [Backpressure(503, None), Backpressure(429, None), None])
@pytest.mark.parametrize(("wait_s", "told"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (2.2, "3")])
async def test_the_time_to_wait_is_told_in_whole_seconds_and_never_as_none(
    gateway: Gateway,
    http: httpx.AsyncClient,
    calls: FakeCalls,
    when_full: Backpressure | None,
    wait_s: float,
    told: str,
) -> None:
    gateway.use_deployments([spec("hello", backpressure=when_full)])
    calls.answer = lambda request: BackPressureError("full", retry_after=wait_s)
    response = await http.get("/hello")
    status = 503 if when_full is None else when_full.status_code
    assert (response.status_code, response.headers["retry-after"]) == (status, told)


async def test_what_a_deployment_says_while_its_queue_is_full_is_said_to_websockets_too(
    gateway: Gateway, http: httpx.AsyncClient, calls: FakeCalls
) -> None:
    gateway.use_deployments([spec("hello", backpressure=Backpressure(429, 7))])
    calls.answer = lambda request: BackPressureError("full", retry_after=2)
    response = await http.get("/hello")
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")
    status, headers, _ = await Handshake(gateway).denial()
    assert (status, headers[b"retry-after"]) == (429, b"7")


async def test_headers_that_say_how_to_serve_a_request_hold_for_websockets_too(
    gateway: Gateway, calls: FakeCalls
) -> None:
    calls.answer = lambda request: GetTimeoutError("late")
    model = (b"serve_multiplexed_model_id", b"lion")
    spoofed = (b"x_forwarded_for", b"1.2.3.4")
    status, *_ = await Handshake(gateway, (b"x-request-timeout-seconds", b"1.5"), model, spoofed).denial()
    assert status == 504
    assert (calls.last.timeout_s, calls.last_put.is_strict, calls.last.meta[MODEL]) == (1.5, True, "lion")
    passed = dict(calls.last.request.headers)
    assert passed.keys() >= {b"connection", b"upgrade"}
    assert spoofed[0] not in passed

    status, _, body = await Handshake(gateway, (b"x-request-timeout-ms", b"soon")).denial()
    assert (status, b"X-Request-Timeout-Ms" in body) == (400, True)


@pytest.mark.parametrize(("path", "root"), [("/", "/hello"), ("/nowhere", "/hello"), ("/-/calls/x", "/")])
async def test_a_websocket_that_belongs_to_no_deployment_is_denied(gateway: Gateway, path: str, root: str) -> None:
    gateway.use_deployments([spec("hello", root)])
    status, headers, _ = await Handshake(gateway, (b"x-request-id", b"one"), path=path).denial()
    assert (status, headers[b"x-request-id"]) == (404, b"one")


@pytest.mark.parametrize(("leaves", "status"), [(True, 503), (False, None)])
async def test_a_handshake_that_a_gateway_cannot_wait_for_is_denied(
    gateway: Gateway, calls: FakeCalls, leaves: bool, status: int | None
) -> None:
    calls.answer = lambda request: None
    handshake = Handshake(gateway)
    await calls.arrived.wait()
    if leaves:
        gateway.leaving.set()
    handshake.task.cancel()
    if status is None:
        with pytest.raises(asyncio.CancelledError):
            await handshake.task
        assert handshake.sent == []
    else:
        told, headers, _ = await handshake.denial()
        assert (told, headers[b"retry-after"]) == (status, b"1")
    assert calls.cancelled == ["call0"]


# Middlewares


class Tag(BaseHTTPMiddleware):
    """Writes its letter into a header on the way out."""

    def __init__(self, app: ASGIApp, letter: str) -> None:
        super().__init__(app)
        self.letter = letter

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["x-tags"] = response.headers.get("x-tags", "") + self.letter
        return response


async def test_middlewares_wrap_everything_and_the_first_is_outermost(
    gateway: Gateway, http: httpx.AsyncClient
) -> None:
    gateway.use_http_options("", [Middleware(Tag, letter="a"), Middleware(Tag, letter="b")])
    for path in ("/hello", "/-/routes", "/nothing"):
        assert (await http.get(path)).headers["x-tags"] == "ba"
    gateway.use_http_options("", [])
    assert "x-tags" not in (await http.get("/hello")).headers


async def test_cors_preflight_is_answered_by_the_middleware(
    gateway: Gateway, http: httpx.AsyncClient, calls: FakeCalls
) -> None:
    gateway.use_http_options("", [Middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"])])
    preflight = {"origin": "https://x.org", "access-control-request-method": "GET"}
    response = await http.options("/", headers=preflight)
    assert response.status_code == 200
    assert "access-control-allow-origin" in response.headers
    assert calls.puts == []


async def test_a_client_that_leaves_is_noticed_through_middlewares(gateway: Gateway, calls: FakeCalls) -> None:
    gateway.use_http_options("", [Middleware(Tag, letter="a")])
    calls.answer = lambda request: None
    connection = Connection(gateway)
    await calls.arrived.wait()
    connection.left.set()
    await calls.withdrawn.wait()
    connection.task.cancel()
    await asyncio.gather(connection.task, return_exceptions=True)
