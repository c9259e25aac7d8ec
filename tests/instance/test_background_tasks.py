"""Background tasks: the response leaves before they run, and they have the time that a replica has to stop."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import BackgroundTasks, FastAPI
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse

from qserve import serve
from qserve.testing import TestInstance
from tests.support.gates import Gate, Notes
from tests.support.processes import connect, read_until
from tests.support.slowness import patience
from tests.support.waiting import joined

pytestmark = pytest.mark.usefixtures("qserve_instance")

KINDS = ["fastapi", "plain", "stream"]


def deployed(kind: str, gate: Gate, notes: Notes, **options: Any) -> serve.Deployment[Any]:
    """The deployment "served", whose background task waits for the gate."""

    async def task() -> None:
        notes.add("task began")
        await gate.passed()
        notes.add("task ended")

    async def parts() -> AsyncIterator[str]:
        yield "answ"
        yield "er"

    app = FastAPI()

    @app.get("/")
    async def answer(tasks: BackgroundTasks) -> PlainTextResponse:
        notes.add("request")
        tasks.add_task(task)
        return PlainTextResponse("answer")

    @serve.deployment(name="served", **options)
    @serve.ingress(app)
    class FromApp:
        pass

    @serve.deployment(name="served", **options)
    async def plain(request: Request) -> PlainTextResponse | StreamingResponse:
        notes.add("request")
        if kind == "stream":
            return StreamingResponse(parts(), background=BackgroundTask(task))
        return PlainTextResponse("answer", background=BackgroundTask(task))

    deployment: serve.Deployment[Any] = FromApp if kind == "fastapi" else plain
    deployment.deploy()
    return deployment


@pytest.mark.parametrize("kind", KINDS)
def test_the_response_is_there_while_the_task_runs(kind: str, http: httpx.Client, gate: Gate, notes: Notes) -> None:
    deployed(kind, gate, notes)

    assert http.get("/served/").text == "answer"

    assert notes.wait_for(2) == ["request", "task began"]
    gate.open()
    assert notes.wait_for(3)[-1] == "task ended"


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_keeps_the_place_of_its_request(kind: str, http: httpx.Client, gate: Gate, notes: Notes) -> None:
    deployed(kind, gate, notes, max_concurrent_queries=1)
    assert http.get("/served/").text == "answer"
    notes.wait_for(2)

    second = threading.Thread(target=http.get, args=("/served/",))
    second.start()
    gate.open()
    joined(second)

    assert notes.wait_for(6) == ["request", "task began", "task ended"] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_waited_for_when_its_replica_stops(kind: str, http: httpx.Client, gate: Gate, notes: Notes) -> None:
    deployment = deployed(kind, gate, notes)
    assert http.get("/served/").text == "answer"
    notes.wait_for(2)

    deletion = threading.Thread(target=deployment.delete)
    deletion.start()
    gate.open()
    joined(deletion)

    assert notes.wait_for(3)[-1] == "task ended"


def test_a_task_that_does_not_end_is_cancelled_after_the_grace_time(
    qserve_instance: TestInstance, http: httpx.Client, gate: Gate, notes: Notes
) -> None:
    deployment = deployed("fastapi", gate, notes, graceful_shutdown_timeout_s=0.5)
    assert http.get("/served/").text == "answer"
    notes.wait_for(2)

    deployment.delete()

    gate.open()
    assert notes.read() == ["request", "task began"]


@pytest.mark.parametrize("header", [{}, {"Idempotency-Key": "key"}], ids=["unsafe", "durable"])
def test_a_task_that_fails_changes_no_response(http: httpx.Client, notes: Notes, header: dict[str, str]) -> None:
    async def fail() -> None:
        notes.add("failed")
        raise ZeroDivisionError

    @serve.deployment(name="served")
    async def failing(request: Request) -> PlainTextResponse:
        return PlainTextResponse("answer", 201, background=BackgroundTask(fail))

    failing.deploy()

    response = http.post("/served/", headers=header)

    assert (response.status_code, response.text) == (201, "answer")
    notes.wait_for(1)
    assert http.post("/served/").text == "answer"


def test_a_task_may_outlive_the_deadline_of_its_request(http: httpx.Client, notes: Notes) -> None:
    deadline_s = patience(1)

    async def task() -> None:
        await asyncio.sleep(deadline_s * 1.5)
        notes.add("task ended")

    @serve.deployment(name="served")
    async def plain(request: Request) -> PlainTextResponse:
        return PlainTextResponse("answer", background=BackgroundTask(task))

    plain.deploy()

    assert http.get("/served/", headers={"x-request-timeout-ms": str(int(deadline_s * 1000))}).text == "answer"
    assert notes.wait_for(1) == ["task ended"]


@pytest.mark.parametrize("behind_middleware", [False, True], ids=["bare", "behind a middleware"])
@pytest.mark.parametrize("kind", ["file", "quick generator", "slow generator"])
def test_the_task_of_a_response_whose_client_leaves_half_way_runs(
    kind: str, behind_middleware: bool, qserve_instance: TestInstance, notes: Notes, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(32 * 1024 * 1024)
    path = str(large)

    async def task() -> None:
        await asyncio.sleep(0.05)  # long enough to be cancelled
        notes.add("task ended")

    async def parts() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 100_000
            if kind == "slow generator":
                await asyncio.sleep(0.01)

    app = FastAPI()

    @app.get("/")
    def download() -> Response:
        background = BackgroundTask(task)
        return (
            FileResponse(path, background=background)
            if kind == "file"
            else StreamingResponse(parts(), 200, background=background)
        )

    if behind_middleware:

        @app.middleware("http")
        async def pass_on(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
            return await call_next(request)

    @serve.deployment(name="served")
    @serve.ingress(app)
    class Served:
        pass

    Served.deploy()

    with connect(qserve_instance, b"GET /served/ HTTP/1.1\r\nhost: HOST\r\n\r\n") as connection:
        read_until(connection, b"\r\n\r\n")
    assert notes.wait_for(1) == ["task ended"]
