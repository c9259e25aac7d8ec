"""Exceptions that nobody handles, in plain and in middleware code."""

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.background import BackgroundTask

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()


@app.middleware("http")
async def may_fail(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    if "fail" in request.query_params:
        raise ValueError("in a middleware")
    return await call_next(request)


@app.get("/sync")
def sync() -> None:
    raise ValueError("in def")


@app.get("/async")
async def asynchronous() -> None:
    raise ValueError("in async def")


@app.get("/wrong-type")
def wrong_type() -> int:
    return "no number"  # type: ignore[return-value]


@app.get("/cancelled")
async def cancelled() -> None:
    task = asyncio.create_task(asyncio.sleep(60))
    task.cancel()
    try:
        await task
    except asyncio.CancelledError as exc:
        raise RuntimeError("cancelled") from exc


@app.get("/background")
def background() -> PlainTextResponse:
    def fail() -> None:
        raise ValueError("after the answer")

    return PlainTextResponse("sent", background=BackgroundTask(fail))


@app.get("/fine")
def fine() -> str:
    return "fine"


@serve.ingress(app)
class Served: ...


CASES = [
    Case("in def", "GET", "/sync"),
    Case("in async def", "GET", "/async"),
    Case("in a middleware", "GET", "/fine?fail"),
    Case("an answer that does not fit its annotation", "GET", "/wrong-type"),
    Case("a task was cancelled", "GET", "/cancelled"),
    Case("after the answer", "GET", "/background"),
    Case("afterwards all is fine", "GET", "/fine"),
]
