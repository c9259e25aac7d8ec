"""What a plain deployment gets and what its results become over HTTP."""

import socket
import threading
import time
from urllib.parse import urlsplit

import httpx
import numpy as np
import pydantic
import pytest
from starlette.requests import Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)

import qserve
from qserve import serve
from qserve.testing import TestInstance
from tests.support.gates import Gate, Notes
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, joined, wait_until

pytestmark = pytest.mark.usefixtures("qserve_instance")


def test_the_request_is_starlettes_with_method_query_headers_and_body(http: httpx.Client) -> None:
    @serve.deployment
    async def tell(request: Request) -> object:
        return [
            type(request).__name__,
            request.method,
            request.query_params["name"],
            request.headers["x-custom"],
            await request.json(),
        ]

    tell.deploy()

    answer = http.post("/tell?name=Ada", json={"a": 1}, headers={"X-Custom": "here"})

    assert answer.json() == ["Request", "POST", "Ada", "here", {"a": 1}]


@pytest.mark.parametrize("size", [650_000, 3_000_000])
def test_a_large_body_arrives_whole_and_comes_back(size: int, http: httpx.Client) -> None:
    @serve.deployment
    async def echo(request: Request) -> bytes:
        return await request.body()

    echo.deploy()
    body = bytes(range(256)) * (size // 256)

    assert http.post("/echo", content=body).content == body


class Model(pydantic.BaseModel):
    """What a result may hold."""

    x: int


def test_results_become_responses_by_their_type(http: httpx.Client) -> None:
    @serve.deployment
    def results(request: Request) -> object:
        values: dict[str, object] = {
            "none": None,
            "bytes": b"abc",
            "text": "text",
            "json": {"a": [1, 2]},
            "more": {"bytes": b"b", "model": Model(x=1), "error": ValueError("text"), "array": np.arange(3)},
            "float": np.float64(1.5),
        }
        return values[request.query_params["kind"]]

    results.deploy()

    def get(kind: str) -> tuple[int, str, str]:
        answer = http.get("/results", params={"kind": kind})
        return answer.status_code, answer.headers["content-type"], answer.text

    assert get("none") == (200, "text/plain", "")
    assert get("bytes") == (200, "text/plain", "abc")
    assert get("text") == (200, "text/plain; charset=utf-8", "text")
    assert get("json") == (200, "application/json", '{\n  "a": [\n    1,\n    2\n  ]\n}')
    assert get("float") == (200, "application/json", "1.5")
    more = http.get("/results", params={"kind": "more"}).json()
    assert more == {"bytes": "b", "model": {"x": 1}, "error": "text", "array": [0, 1, 2]}


def test_responses_of_starlette_go_as_they_are(http: httpx.Client) -> None:
    @serve.deployment
    def responses(request: Request) -> Response:
        kinds: dict[str, Response] = {
            "plain": PlainTextResponse("plain", status_code=201, headers={"x-custom": "1"}),
            "html": HTMLResponse("<p>"),
            "json": JSONResponse({"a": 1}, status_code=418),
            "redirect": RedirectResponse("/elsewhere"),
            "raw": Response(b"raw", media_type="application/octet-stream"),
            "stream": StreamingResponse(iter(["1", "2", "3"]), status_code=418, media_type="text/csv"),
        }
        return kinds[request.query_params["kind"]]

    responses.deploy()

    def get(kind: str) -> tuple[int, str, str]:
        answer = http.get("/responses", params={"kind": kind})
        return answer.status_code, answer.headers.get("content-type", ""), answer.text

    assert get("plain") == (201, "text/plain; charset=utf-8", "plain")
    assert http.get("/responses?kind=plain").headers["x-custom"] == "1"
    assert get("html") == (200, "text/html; charset=utf-8", "<p>")
    assert get("json") == (418, "application/json", '{"a":1}')
    assert http.get("/responses?kind=redirect").headers["location"] == "/elsewhere"
    assert get("raw") == (200, "application/octet-stream", "raw")
    assert get("stream") == (418, "text/csv; charset=utf-8", "123")


def test_no_header_is_doubled_and_every_cookie_survives(http: httpx.Client) -> None:
    @serve.deployment
    def cookies() -> Response:
        response = PlainTextResponse("cookies!!")
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        return response

    cookies.deploy()

    answer = http.get("/cookies")

    assert answer.headers.get_list("content-length") == ["9"]
    assert [cookie.partition(";")[0] for cookie in answer.headers.get_list("set-cookie")] == ["a=1", "b=2"]
    assert len(answer.headers.get_list("date")) <= 1
    assert len(answer.headers.get_list("server")) <= 1


def test_an_exception_is_500_with_its_class_and_without_its_traceback(http: httpx.Client) -> None:
    @serve.deployment
    def fails() -> None:
        raise ZeroDivisionError("secret of the house")

    fails.deploy()

    answer = http.get("/fails")

    assert answer.status_code == 500
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text.startswith("Task Error. ZeroDivisionError. Request ")
    assert "secret" not in answer.text


def test_a_request_whose_client_leaves_while_it_is_queued_never_reaches_the_replica(
    qserve_instance: TestInstance, gate: Gate, notes: Notes, http: httpx.Client
) -> None:
    @serve.deployment(max_concurrent_queries=1)
    async def one_at_a_time(request: Request) -> str:
        notes.add(request.query_params["who"])
        await gate.passed()
        return "done"

    one_at_a_time.deploy()
    first = threading.Thread(target=http.get, args=("/one_at_a_time?who=first",))
    first.start()
    notes.wait_for(1)
    address = urlsplit(qserve_instance.url)
    with socket.create_connection((address.hostname, address.port), patience(LIMIT_S)) as leaving:
        leaving.sendall(b"GET /one_at_a_time?who=leaving HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: serve.status()["one_at_a_time"].queued == 2)

    wait_until(lambda: serve.status()["one_at_a_time"].queued == 1)
    gate.open()
    joined(first)
    assert http.get("/one_at_a_time?who=last").text == "done"
    assert notes.read() == ["first", "last"]


def test_state_lives_in_the_replica(http: httpx.Client) -> None:
    @serve.deployment
    class Counter:
        def __init__(self) -> None:
            self.count = 0

        def __call__(self) -> object:
            self.count += 1
            return {"count": self.count}

    Counter.deploy()

    assert [http.get("/Counter").json()["count"] for _ in range(2)] == [1, 2]
    assert Counter.get_handle().remote().result(patience(LIMIT_S)) == {"count": 3}


def test_a_deadline_that_passes_is_504_and_a_full_queue_503(gate: Gate, notes: Notes, http: httpx.Client) -> None:
    @serve.deployment(max_concurrent_queries=1, max_queued_requests=2, timeout_s=0.5)
    async def busy() -> str:
        notes.add("running")
        await gate.passed()
        return "done"

    busy.deploy()
    handle = busy.get_handle()
    running = handle.remote()
    notes.wait_for(1)

    assert http.get("/busy").status_code == 504
    wait_until(lambda: serve.status()["busy"].queued == 1)
    waiting = handle.remote()
    wait_until(lambda: serve.status()["busy"].queued == 2)
    refused = http.get("/busy")
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    with pytest.raises(qserve.BackPressureError):
        handle.remote().result(patience(LIMIT_S))
    gate.open()
    assert qserve.get([running, waiting], timeout=patience(LIMIT_S)) == ["done", "done"]


def test_a_sync_method_that_computes_does_not_stop_the_replica_from_being_alive(http: httpx.Client) -> None:
    @serve.deployment
    class Busy:
        def __call__(self) -> str:
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                pass
            return "computed"

        async def quick(self, request: Request) -> str:
            return "quick"

    Busy.deploy()
    computing = Busy.get_handle().remote()

    assert http.get("/Busy", headers={"X-Serve-Call-Method": "quick"}).text == "quick"
    assert computing.result(patience(LIMIT_S)) == "computed"
