"""Durable calls over HTTP: 202 now, the response later; idempotency keys; events."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

import qserve
from qserve import serve
from qserve.testing import TestInstance
from tests.support.gates import Gate, Notes
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, joined

ASYNC = {"Prefer": "respond-async"}


def submitted(response: httpx.Response) -> str:
    """Where the response of a call will be."""
    assert response.status_code == 202, response.text
    location = response.headers["location"]
    assert location.startswith("/-/calls/")
    return str(location)


def ended(http: httpx.Client, location: str) -> dict[str, Any]:
    """The call at its end."""
    response = http.get(location, params={"wait": 20})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.fixture
def held(qserve_instance: TestInstance, gate: Gate, notes: Notes) -> serve.Deployment[Any]:
    """Answers with its body once the gate is open."""

    @serve.deployment
    async def held(request: Request) -> PlainTextResponse:
        body = await request.body()
        notes.add(body.decode())
        await gate.passed()
        return PlainTextResponse(b"got " + body, 201, {"X-Mine": "yes"})

    held.deploy()
    return held


def test_a_request_is_answered_later(held: Any, http: httpx.Client, gate: Gate, notes: Notes) -> None:
    response = http.post("/held", content="one", headers=ASYNC)
    location = submitted(response)
    assert response.headers["preference-applied"] == "respond-async"
    notes.wait_for(1)

    running = http.get(location)
    assert running.status_code == 202
    assert running.json()["state"] == "running"
    assert running.json()["attempts"] == 1
    gate.open()

    call = ended(http, location)
    assert call["state"] == "done"
    assert call["response"]["status"] == 201
    assert call["response"]["body"] == "got one"
    assert ["x-mine", "yes"] in call["response"]["headers"]
    itself = http.get(location, params={"response": "true"})
    assert (itself.status_code, itself.text, itself.headers["x-mine"]) == (201, "got one", "yes")


def test_a_client_that_does_not_want_to_wait_never_gets_the_response_at_once(
    held: Any, http: httpx.Client, gate: Gate
) -> None:
    gate.open()

    for number in range(30):
        submitted(http.post("/held", content=str(number), headers=ASYNC))


def test_a_call_waits_its_turn_and_says_where_it_stands(
    qserve_instance: TestInstance, http: httpx.Client, gate: Gate, notes: Notes
) -> None:
    @serve.deployment
    def one_by_one() -> str:
        notes.add("started")
        gate.pass_through()
        return "done"

    one_by_one.deploy()
    first, *rest = [submitted(http.post("/one_by_one", headers=ASYNC)) for _ in range(3)]
    notes.wait_for(1)

    assert [http.get(location).json()["state"] for location in rest] == ["queued", "queued"]
    assert [http.get(location).json()["position"] for location in rest] == [0, 1]
    assert http.get(first).json()["position"] is None


def test_waiting_for_a_response_is_bounded_by_what_the_client_asks_for(
    held: Any, http: httpx.Client, gate: Gate, notes: Notes
) -> None:
    slow = http.post("/held", content="slow", headers={"Prefer": "wait=1"})
    location = submitted(slow)
    assert slow.headers["preference-applied"] == "wait=1"
    assert http.get(location, params={"wait": "0.2"}).status_code == 202
    gate.open()

    quick = http.post("/held", content="quick", headers={"Prefer": "wait=30"})

    assert (quick.status_code, quick.text) == (201, "got quick")
    assert quick.headers["preference-applied"] == "wait=30"
    assert ended(http, location)["response"]["body"] == "got slow"


def test_a_queued_call_can_be_cancelled(
    held: Any, qserve_instance: TestInstance, http: httpx.Client, gate: Gate, notes: Notes
) -> None:
    @serve.deployment
    def one_by_one(request: Request) -> None:
        notes.add(request.query_params["n"])
        gate.pass_through()

    one_by_one.deploy()
    first = submitted(http.get("/one_by_one?n=1", headers=ASYNC))
    notes.wait_for(1)
    second = submitted(http.get("/one_by_one?n=2", headers=ASYNC))

    assert http.delete(second).status_code == 200
    gate.open()

    assert ended(http, first)["state"] == "done"
    assert ended(http, second)["state"] == "cancelled"
    assert http.delete(second).status_code == 409
    assert http.get("/one_by_one?n=3").status_code == 200
    assert notes.read() == ["1", "3"]


def test_a_running_call_can_be_cancelled(held: Any, http: httpx.Client, notes: Notes) -> None:
    location = submitted(http.post("/held", content="x", headers=ASYNC))
    notes.wait_for(1)

    assert http.delete(location).status_code == 202

    assert ended(http, location)["state"] == "cancelled"
    assert http.get(location, params={"response": "true"}).status_code == 499


def test_an_unknown_call_is_not_found(qserve_instance: TestInstance, http: httpx.Client) -> None:
    for path in ("/-/calls/d" + "0" * 32, "/-/calls/nonsense", "/-/calls/", "/-/calls/d" + "0" * 32 + "/events"):
        assert http.get(path).status_code == 404, path
    assert http.delete("/-/calls/d" + "0" * 32).status_code == 404


def test_a_streamed_response_is_kept_whole(qserve_instance: TestInstance, http: httpx.Client) -> None:
    @serve.deployment
    def letters() -> StreamingResponse:
        return StreamingResponse(iter(["a", "b", "c"]), media_type="text/plain")

    letters.deploy()

    assert ended(http, submitted(http.get("/letters", headers=ASYNC)))["response"]["body"] == "abc"


def test_an_error_is_told_as_ever(qserve_instance: TestInstance, http: httpx.Client) -> None:
    @serve.deployment
    def broken() -> None:
        raise ZeroDivisionError

    broken.deploy()

    location = submitted(http.get("/broken", headers=ASYNC))

    assert ended(http, location)["state"] == "failed"
    response = http.get(location, params={"response": "true"})
    assert response.status_code == 500
    assert response.text.startswith("Task Error. ZeroDivisionError.")


def test_python_and_http_share_calls(held: Any, http: httpx.Client, gate: Gate) -> None:
    @serve.deployment
    def add(first: int, second: int) -> dict[str, int]:
        return {"sum": first + second}

    add.deploy()
    gate.open()

    location = submitted(http.post("/held", content="one", headers=ASYNC))
    response = serve.get_ref(location.rpartition("/")[2]).result(patience(LIMIT_S))
    assert (response.status_code, response.body, response.headers["x-mine"]) == (201, b"got one", "yes")
    ref = add.get_handle().options(durable=True).remote(1, 2)
    assert ended(http, f"/-/calls/{ref.id}")["result"] == {"sum": 3}
    assert http.get(f"/-/calls/{ref.id}", params={"response": "true"}).json() == {"sum": 3}


class TestIdempotencyKeys:
    def test_the_same_request_gets_the_same_answer(
        self, held: Any, http: httpx.Client, gate: Gate, notes: Notes
    ) -> None:
        gate.open()

        first, second = (http.post("/held", content="pay", headers={"Idempotency-Key": "k1"}) for _ in range(2))

        assert (first.status_code, first.text) == (second.status_code, second.text) == (201, "got pay")
        assert "idempotent-replayed" not in first.headers
        assert second.headers["idempotent-replayed"] == "true"
        assert notes.read() == ["pay"]

    def test_another_request_with_the_key_is_refused(self, held: Any, http: httpx.Client, gate: Gate) -> None:
        gate.open()
        http.post("/held", content="pay", headers={"Idempotency-Key": "k2"})

        assert http.post("/held", content="pay more", headers={"Idempotency-Key": "k2"}).status_code == 422
        assert http.put("/held", content="pay", headers={"Idempotency-Key": "k2"}).status_code == 422

    def test_a_request_whose_twin_runs_joins_it(self, held: Any, http: httpx.Client, gate: Gate, notes: Notes) -> None:
        texts: list[str] = []

        def send() -> None:
            texts.append(http.post("/held", content="pay", headers={"Idempotency-Key": "k3"}).text)

        senders = [threading.Thread(target=send) for _ in range(5)]
        for sender in senders:
            sender.start()
        notes.wait_for(1)
        time.sleep(0.2)
        gate.open()
        joined(*senders)

        assert texts == ["got pay"] * 5
        assert notes.read() == ["pay"]

    def test_the_key_of_somebody_else_is_another_key(self, held: Any, http: httpx.Client, gate: Gate) -> None:
        gate.open()
        mine = {"Idempotency-Key": "k4", "Authorization": "Bearer me"}
        yours = {"Idempotency-Key": "k4", "Authorization": "Bearer you"}

        assert http.post("/held", content="mine", headers=mine).text == "got mine"
        assert http.post("/held", content="yours", headers=yours).text == "got yours"

    def test_an_answer_that_comes_late_can_still_be_had(self, gate: Gate, http: httpx.Client, notes: Notes) -> None:
        @serve.deployment(timeout_s=0.3)
        def slow() -> str:
            notes.add("ran")
            gate.pass_through()
            return "slow"

        slow.deploy()
        headers = {"Idempotency-Key": "k5"}

        late = http.post("/slow", headers=headers)
        assert late.status_code == 504
        gate.open()

        assert ended(http, late.headers["location"])["response"]["body"] == "slow"
        assert http.post("/slow", headers=headers).text == "slow"
        assert notes.read() == ["ran"]

    @pytest.mark.parametrize("key", ["", "x" * 256])
    def test_an_impossible_key_is_refused(self, held: Any, http: httpx.Client, key: str) -> None:
        assert http.post("/held", headers={"Idempotency-Key": key}).status_code == 400

    def test_refusals_are_not_remembered(self, http: httpx.Client, gate: Gate, notes: Notes) -> None:
        @serve.deployment(max_queued_requests=1)
        def small() -> str:
            notes.add("ran")
            gate.pass_through()
            return "fits"

        small.deploy()
        location = submitted(http.get("/small", headers=ASYNC))
        headers = {"Idempotency-Key": "k6"}
        full = http.post("/small", headers=headers)
        assert full.status_code == 503
        assert "retry-after" in full.headers
        gate.open()
        ended(http, location)

        assert http.post("/small", headers=headers).text == "fits"


def events_of(response: httpx.Response) -> Iterator[tuple[int, str, dict[str, Any]]]:
    number, name = 0, ""
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "id":
            number = int(value)
        elif field == "event":
            name = value
        elif field == "data":
            yield number, name, json.loads(value)


class TestEvents:
    def test_they_tell_a_call_from_queue_to_end(self, http: httpx.Client, gate: Gate) -> None:
        @serve.deployment
        async def steps(request: Request) -> JSONResponse:
            serve.get_replica_context().report_progress({"step": 1})
            await gate.passed()
            return JSONResponse({})

        steps.deploy()
        location = submitted(http.get("/steps", headers=ASYNC))

        with http.stream("GET", f"{location}/events") as response:
            assert response.headers["content-type"] == "text/event-stream"
            found = []
            for number, name, data in events_of(response):
                found.append((number, name))
                if name == "progress":
                    assert data["progress"] == {"step": 1}
                    gate.open()

        assert found == [(1, "queued"), (2, "started"), (3, "progress"), (4, "done")]
        assert data["state"] == "done"

        with http.stream("GET", f"{location}/events", headers={"Last-Event-ID": "2"}) as response:
            assert [name for _, name, _ in events_of(response)] == ["progress", "done"]

    def test_they_tell_of_retries(self, http: httpx.Client, qserve_instance: TestInstance) -> None:
        @serve.deployment
        def flaky() -> int:
            if serve.get_replica_context().attempt == 1:
                raise ValueError("not yet")
            return 1

        flaky.deploy()
        ref = flaky.get_handle().options(durable=True, retries=1, backoff=0.05).remote()

        with http.stream("GET", f"/-/calls/{ref.id}/events") as response:
            found = [(name, data.get("error")) for _, name, data in events_of(response)]

        assert [name for name, _ in found] == ["queued", "started", "retrying", "queued", "started", "done"]
        assert found[2][1] == "ValueError: not yet"


def test_preferences_that_mean_nothing_here_change_nothing(held: Any, http: httpx.Client, gate: Gate) -> None:
    gate.open()

    response = http.post("/held", content="one", headers={"Prefer": "return=minimal, wait=soon"})

    assert response.status_code == 201
    assert "preference-applied" not in response.headers


def test_the_queue_bound_refuses_with_503(http: httpx.Client, gate: Gate, qserve_instance: TestInstance) -> None:
    @serve.deployment(max_queued_requests=1)
    def small() -> None:
        gate.pass_through()

    small.deploy()
    submitted(http.get("/small", headers=ASYNC))

    full = http.get("/small", headers=ASYNC)

    assert full.status_code == 503
    assert "retry-after" in full.headers
    assert qserve.BackPressureError.__name__ in full.text
