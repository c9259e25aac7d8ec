"""`python -m qserve_gateway` against a real server, with replies that each test writes as a replica would."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from starlette.middleware.cors import CORSMiddleware

from qserve.broker.instance.state import State
from qserve.deployments.loading import make_target
from qserve.settings import Settings
from qserve.wire.codec import Codec
from qserve.wire.messages import (
    HTTP_RESPONSE,
    Call,
    HttpRequest,
    HttpResponse,
    Reply,
    Signer,
    decode_blob,
    decode_call,
    decode_http_request,
    encode,
)
from qserve.wire.spec import DeploymentSpec, GatewayInfo, HttpSettings, MiddlewareSpec, Target
from tests.support import recording_hooks
from tests.support.processes import end_at_once
from tests.support.slowness import patience
from tests.support.waiting import wait_until


class Process:
    """A gateway process and what it said when it was ready."""

    def __init__(self, process: "subprocess.Popen[str]", ready: dict[str, Any]) -> None:
        self.process = process
        self.ready = ready
        self.url = str(ready.get("url", ""))

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=patience(10))


Start = Callable[..., Process]


@pytest.fixture
def start(settings: Settings) -> Iterator[Start]:
    """Starts gateways on a free port, and ends those that are left."""
    started: list[subprocess.Popen[str]] = []

    def start(
        *arguments: str, ready_file: Path | None = None, pass_fds: tuple[int, ...] = (), **environment: str
    ) -> Process:
        reading, writing = os.pipe()
        told = ready_file or Path(f"/dev/fd/{writing}")
        command = [sys.executable, "-m", "qserve_gateway", "--port", "0", "--ready-file", str(told)]
        variables = {
            "QSERVE_REDIS_URL": settings.redis_url,
            "QSERVE_SECRET": settings.secret,
            "QSERVE_NAMESPACE": settings.namespace,
        }
        process = subprocess.Popen(
            [*command, *arguments],
            env={**os.environ, **variables, **environment},
            pass_fds=(*pass_fds, *(() if ready_file else (writing,))),
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(writing)
        started.append(process)
        with os.fdopen(reading) as pipe:
            line = pipe.readline()
        if ready_file is not None:
            wait_until(lambda: ready_file.exists() and ready_file.read_text().endswith("\n"))
            line = ready_file.read_text()
        return Process(process, json.loads(line))

    yield start
    end_at_once(*started)


def deploy(state: State, name: str, route: str | None, **options: Any) -> str:
    spec = DeploymentSpec(name=name, target=Target("m:n"), revision="1", route_prefix=route, **options)
    return state.deploy(spec, expected=state.generation(name)).log_id


def gateway(state: State) -> GatewayInfo:
    (info,) = state.observed.gateways().values()
    return info


class Replica:
    """Takes calls off a queue and answers them, without the machinery of a real one."""

    def __init__(self, client: "redis.Redis", settings: Settings, deployment: str) -> None:
        self.redis = client
        self.keys = settings.keys.of(deployment)
        self.signer = Signer(settings.secrets)
        self.queue = self.keys.calls(deployment)

    def waiting(self) -> int:
        return int(self.redis.xlen(self.queue))

    def take(self) -> Call:
        wait_until(lambda: self.waiting() > 0)
        entries: Any = self.redis.xrange(self.queue, count=1)
        ((entry_id, fields),) = entries
        self.redis.xdel(self.queue, entry_id)
        return decode_call(self.signer.open(fields[b"d"]))

    def request(self, call: Call) -> HttpRequest:
        payload = call.payload
        if call.out_of_line:
            sealed = self.redis.get(self.keys.payload(call.id))
            assert isinstance(sealed, bytes)
            payload = decode_blob(self.signer.open(sealed)).data
        return decode_http_request(payload)

    def reply(self, call: Call, response: HttpResponse) -> None:
        reply = Reply(call.id, call.reply_to, HTTP_RESPONSE, encode(response))
        self.redis.xadd(self.keys.inbox(call.reply_to), {"d": self.signer.seal(encode(reply))})


@pytest.fixture
def hello(state: State, redis_client: "redis.Redis", settings: Settings) -> Replica:
    """The deployment /hello and its replica."""
    deploy(state, "hello", "/hello")
    return Replica(redis_client, settings, "hello")


def ok(body: bytes = b"ok") -> HttpResponse:
    return HttpResponse(200, [(b"content-type", b"text/plain")], body)


# Starting and stopping


def test_the_ready_file_tells_where_it_serves(start: Start, state: State) -> None:
    process = start()
    assert process.ready["pid"] == process.process.pid
    assert process.url == f"http://127.0.0.1:{process.ready['port']}"
    with process.http() as http:
        assert http.get("/-/healthz").status_code == 200
        assert http.get("/-/routes").json() == {}


def test_a_ready_file_that_is_a_file_appears_whole(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "ready"
    assert start(ready_file=file).ready["port"] > 0
    assert list(tmp_path.iterdir()) == [file]


def test_a_ready_file_that_is_a_link_is_written_to_and_not_replaced(start: Start, tmp_path: Path) -> None:
    """Such as /dev/stdout."""
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    start(ready_file=link)
    assert link.is_symlink()
    assert file.is_file()


@pytest.mark.parametrize("host", ["127.0.0.1", "203.0.113.1", "no-such-host.invalid"])
def test_an_address_that_cannot_be_had_is_told_in_one_line(start: Start, host: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        failed = start("--host", host, "--port", str(port))
    assert failed.process.wait(patience(10)) == 1
    assert failed.process.stderr is not None
    (line,) = failed.process.stderr.read().splitlines()
    assert line.startswith(f"cannot listen on {host}:{port}: ")
    assert failed.ready["error"] == line


def test_a_wrong_redis_password_is_told_and_ends_it(start: Start, settings: Settings) -> None:
    failed = start(QSERVE_REDIS_URL=settings.redis_url.replace("://", "://user:wrong@"))
    assert failed.process.wait(patience(10)) == 1
    assert failed.ready["error"]


def test_two_gateways_share_a_port(start: Start) -> None:
    first = start("--reuse-port")
    second = start("--reuse-port", "--port", str(first.ready["port"]))
    assert second.url == first.url
    first.process.terminate()
    assert first.process.wait(patience(10)) == 0
    with second.http() as http:
        assert http.get("/-/healthz").status_code == 200


def test_an_inherited_socket_is_served(start: Start) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        process = start("--fd", str(bound.fileno()), pass_fds=(bound.fileno(),))
        assert process.ready["port"] == bound.getsockname()[1]
        with process.http() as http:
            assert http.get("/-/healthz").status_code == 200


def test_sigterm_lets_requests_in_flight_finish(start: Start, state: State, hello: Replica) -> None:
    process = start()
    with process.http() as http, ThreadPoolExecutor() as pool:
        answer = pool.submit(http.get, "/hello")
        call = hello.take()
        process.process.terminate()
        wait_until(lambda: state.observed.gateways() == {})
        hello.reply(call, ok())
        assert answer.result().text == "ok"
    assert process.process.wait(patience(10)) == 0
    assert hello.redis.exists(hello.keys.inbox(call.reply_to), hello.keys.alive(call.reply_to)) == 0


def test_a_request_that_cannot_be_finished_is_told_whether_to_come_again(start: Start, hello: Replica) -> None:
    process = start("--graceful-shutdown-timeout", "1")
    with process.http() as http, ThreadPoolExecutor() as pool:
        answers = {
            pool.submit(http.get, "/hello"): (503, "1"),
            pool.submit(http.put, "/hello", content=b"body"): (503, "1"),
            pool.submit(http.post, "/hello"): (502, None),
            pool.submit(http.post, "/hello", content=b"body"): (502, None),
        }
        calls = [hello.take() for _ in answers]
        process.process.terminate()
        for answer, told in answers.items():
            response = answer.result()
            assert (response.status_code, response.headers.get("retry-after")) == told
            assert "this gateway is leaving" in response.text
            assert ("the call may have run" in response.text) is (told[0] == 502)
    assert process.process.wait(patience(10)) == 0
    assert hello.redis.exists(*(hello.keys.inbox(call.reply_to) for call in calls)) == 0


def test_a_second_sigterm_waits_for_no_request_and_tells_so(start: Start, state: State, hello: Replica) -> None:
    process = start()
    with process.http() as http, ThreadPoolExecutor() as pool:
        answer = pool.submit(http.post, "/hello", content=b"body")
        hello.take()
        process.process.terminate()
        wait_until(lambda: state.observed.gateways() == {})
        process.process.terminate()
        assert answer.result().status_code == 502
    assert process.process.wait(patience(10)) == 0


def test_a_client_of_a_durable_call_is_told_where_its_response_will_be(
    start: Start, state: State, hello: Replica
) -> None:
    process = start()
    with process.http() as http, ThreadPoolExecutor() as pool:
        answers = {
            pool.submit(http.post, "/hello", headers=headers): status
            for headers, status in (({"Prefer": "wait=50"}, 202), ({"Idempotency-Key": "order-1"}, 504))
        }
        wait_until(lambda: hello.waiting() == len(answers))
        process.process.terminate()
        wait_until(lambda: state.observed.gateways() == {})
        process.process.terminate()
        told = {answer.result().headers["location"].rpartition("/")[2] for answer in answers}
        assert [answer.result().status_code for answer in answers] == [*answers.values()]
    assert hello.redis.exists(*(hello.keys.call(call_id) for call_id in told)) == len(answers)
    assert process.process.wait(patience(10)) == 0


def test_who_follows_a_durable_call_goes_on_at_another_gateway(start: Start, hello: Replica) -> None:
    """A gateway that leaves does not wait for the end of the call, and logs no failure."""
    process = start("--graceful-shutdown-timeout", "60")
    with process.http() as http:
        location = http.post("/hello", headers={"Prefer": "respond-async"}).headers["location"]
        with http.stream("GET", f"{location}/events") as events:
            lines = events.iter_lines()
            assert "event: queued" in lines
            process.process.terminate()
            rest = [*lines]
    assert "event: done" not in rest
    assert process.process.wait(patience(10)) == 0
    assert process.process.stderr is not None
    assert "Traceback" not in process.process.stderr.read()


# Following the state


def test_a_change_is_applied_and_reported_within_milliseconds(start: Start, state: State) -> None:
    process = start()
    with process.http() as http:
        wait_until(lambda: len(state.observed.gateways()) == 1)
        took = []
        for number in range(5):
            log_id = deploy(state, f"d{number}", f"/d{number}")
            began = time.monotonic()
            wait_until(lambda: gateway(state).applied == log_id)  # noqa: B023
            took.append(time.monotonic() - began)
            assert f"/d{number}" in http.get("/-/routes").json()
        assert min(took) < patience(0.05)
        state.delete("d0")
        wait_until(lambda: "/d0" not in http.get("/-/routes").json())
    assert gateway(state).url == process.url


def test_middlewares_come_and_go_with_the_http_options(
    start: Start, state: State, settings: Settings, hello: Replica
) -> None:
    process = start()
    wait_until(lambda: len(state.observed.gateways()) == 1)
    codec = Codec(allow_pickle=True, max_bytes=1000)
    target = make_target(CORSMiddleware, allow_pickle=False)
    cors = MiddlewareSpec(target, codec.pack_call((), {"allow_origins": ["https://a.example"]}))
    for middlewares in ((cors,), ()):
        log_id = state.set_http(HttpSettings(middlewares=middlewares, root_path="/serve"))
        wait_until(lambda: gateway(state).applied == log_id)  # noqa: B023
        with process.http() as http:
            response = http.get("/serve/-/routes", headers={"origin": "https://a.example"})
        assert response.json() == {"/hello": "hello"}
        assert ("access-control-allow-origin" in response.headers) is bool(middlewares)


def test_a_middleware_that_cannot_be_loaded_changes_nothing_and_is_not_reported_as_applied(
    start: Start, state: State
) -> None:
    process = start()
    wait_until(lambda: len(state.observed.gateways()) == 1)
    broken = state.set_http(HttpSettings(middlewares=(MiddlewareSpec(Target("no.such:Middleware")),)))
    assert process.process.stderr is not None
    while "HTTP options stay as they were" not in (line := process.process.stderr.readline()):
        assert line
    assert gateway(state).applied != broken
    with process.http() as http:
        assert http.get("/-/routes").status_code == 200


def test_a_gateway_does_not_start_without_its_middlewares(start: Start, state: State) -> None:
    """One of them may be what keeps strangers out."""
    state.set_http(HttpSettings(middlewares=(MiddlewareSpec(Target("no.such:Middleware")),)))
    failed = start()
    assert failed.process.wait(patience(10)) == 1
    assert "no.such" in failed.ready["error"]


# Requests


def test_a_request_becomes_a_call_and_its_reply_the_response(start: Start, hello: Replica) -> None:
    process = start()
    with process.http() as http, ThreadPoolExecutor() as pool:
        answer = pool.submit(http.post, "/hello/a?x=1", content=bytes(200_000), headers={"x-a": "b"})
        call = hello.take()
        request = hello.request(call)
        assert (request.method, request.path, request.query_string) == ("POST", "/hello/a", b"x=1")
        assert request.body == bytes(200_000)
        assert call.safe is False
        hello.reply(call, HttpResponse(201, [(b"x-c", b"d")], b"made"))
        response = answer.result()
    assert (response.status_code, response.text, response.headers["x-c"]) == (201, "made", "d")
    assert response.headers["server"] == "uvicorn"
    assert "date" in response.headers


def test_many_requests_at_once_get_their_own_answers(start: Start, hello: Replica) -> None:
    process = start()
    with process.http() as http, ThreadPoolExecutor(32) as pool:
        answers = {n: pool.submit(http.get, f"/hello/{n}") for n in range(32)}
        for call in [hello.take() for _ in answers]:
            hello.reply(call, ok(hello.request(call).path.encode()))
        assert {n: answer.result().text for n, answer in answers.items()} == {n: f"/hello/{n}" for n in answers}


@pytest.mark.parametrize("after_s", [0.0, 0.2])
def test_a_queued_request_of_a_client_that_leaves_never_reaches_a_replica(
    start: Start, hello: Replica, after_s: float
) -> None:
    process = start()
    with socket.create_connection(("127.0.0.1", process.ready["port"])) as connection:
        connection.sendall(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n")
        wait_until(lambda: hello.waiting() == 1)
        time.sleep(after_s)  # before it is listened to, and after
    wait_until(lambda: hello.waiting() == 0, limit_s=1)


def test_a_call_without_replicas_is_503_at_its_deadline(start: Start, state: State) -> None:
    deploy(state, "hello", "/hello", timeout_s=0.3)
    process = start()
    with process.http() as http:
        response = http.get("/hello")
    assert response.status_code == 503
    assert "no replica of 'hello' has been seen" in response.text
    assert int(response.headers["retry-after"]) >= 1


def test_a_full_queue_is_503(start: Start, state: State, redis_client: "redis.Redis", settings: Settings) -> None:
    deploy(state, "hello", "/hello", max_queued_requests=1)
    hello = Replica(redis_client, settings, "hello")
    process = start()
    with process.http() as http, ThreadPoolExecutor() as pool:
        first = pool.submit(http.get, "/hello")
        wait_until(lambda: hello.waiting() == 1)
        response = http.get("/hello")
        assert response.status_code == 503
        assert "full" in response.text
        assert int(response.headers["retry-after"]) >= 1
        hello.reply(hello.take(), ok())
        assert first.result().status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413_before_anything_is_queued(start: Start, hello: Replica, chunked: bool) -> None:
    process = start(QSERVE_MAX_BODY_BYTES="100000")
    body = bytes(3_000_000)
    with process.http() as http, ThreadPoolExecutor() as pool:
        response = http.post("/hello", content=iter([body]) if chunked else body)
        assert response.status_code == 413
        assert response.headers["connection"] == "close"  # or the next request could meet a connection that ends
        assert hello.waiting() == 0
        answer = pool.submit(http.get, "/hello")
        hello.reply(hello.take(), ok())
        assert answer.result().text == "ok"


def test_a_response_that_would_split_is_500_and_the_connection_goes_on(start: Start, hello: Replica) -> None:
    process = start()
    with process.http() as http, ThreadPoolExecutor() as pool:
        for header, status in (((b"x", b"1\r\nset-cookie: a=b"), 500), ((b"x", b"1"), 200)):
            answer = pool.submit(http.get, "/hello")
            hello.reply(hello.take(), HttpResponse(200, [header], b"ok"))
            response = answer.result()
            assert response.status_code == status
            assert "set-cookie" not in response.headers


def test_forwarded_headers_are_believed_from_named_proxies_only(start: Start, hello: Replica) -> None:
    headers = {"x-forwarded-proto": "https", "x-forwarded-for": "192.0.2.1"}
    for trusted, scheme, client in (((), "http", "127.0.0.1"), (("127.0.0.1",), "https", "192.0.2.1")):
        process = start(*(argument for ip in trusted for argument in ("--forwarded-allow-ips", ip)))
        with process.http() as http, ThreadPoolExecutor() as pool:
            answer = pool.submit(http.get, "/hello", headers=headers)
            call = hello.take()
            request = hello.request(call)
            hello.reply(call, ok())
            answer.result()
        assert request.client is not None
        assert (request.scheme, request.client[0]) == (scheme, client)


@pytest.mark.parametrize("size", [0, 1000, 3_000_000])
def test_what_a_hook_says_travels_with_the_call(start: Start, hello: Replica, tmp_path: Path, size: int) -> None:
    hooks = {"QSERVE_HOOKS": recording_hooks.HOOKS, recording_hooks.NOTES: str(tmp_path / "notes")}
    with start(**hooks).http() as http, ThreadPoolExecutor() as pool:
        answer = pool.submit(http.post, "/hello/there", content=bytes(size))
        call = hello.take()
        assert call.meta == {"path": "/hello/there"}
        hello.reply(call, ok())
        assert answer.result().text == "ok"


def test_a_gateway_whose_packages_are_not_installed_says_what_to_install() -> None:
    code = "import runpy, sys; sys.modules['uvicorn'] = None; runpy.run_module('qserve_gateway', run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    says = "A gateway needs the package 'uvicorn', which is not installed: pip install 'qserve[gateway]'"
    assert ended.stderr.strip() == says
