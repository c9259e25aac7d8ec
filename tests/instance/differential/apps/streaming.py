"""Streamed responses: generators of both kinds, events, nothing, headers."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

from qserve import serve
from tests.instance.differential.case import Body, Case

app = FastAPI()
ended: list[str] = []


def numbers(count: int) -> Iterator[bytes]:
    with suppress(GeneratorExit):
        for number in range(count):
            yield b"%d\n" % number
    ended.append("numbers")


async def events() -> AsyncIterator[str]:
    for number in range(3):
        await asyncio.sleep(0.03)
        yield f"id: {number}\ndata: event {number}\n\n"


@app.get("/sync/{count}")
def sync(count: int) -> StreamingResponse:
    return StreamingResponse(numbers(count), media_type="text/plain")


@app.get("/events")
async def get_events() -> StreamingResponse:
    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


@app.get("/large")
async def large() -> StreamingResponse:
    return StreamingResponse(iter([b"x" * 100_000] * 20), media_type="application/octet-stream")


@app.get("/length")
async def length() -> StreamingResponse:
    return StreamingResponse(numbers(3), headers={"Content-Length": "6"}, status_code=201)


@app.get("/background")
async def background() -> StreamingResponse:
    return StreamingResponse(numbers(1), background=BackgroundTask(ended.append, "background"))


@app.get("/ended")
async def get_ended() -> list[str]:
    return ended


@app.post("/echo")
async def echo(request: Request) -> StreamingResponse:
    parts = [part async for part in request.stream()]  # first: uvicorn cannot read while a response streams
    return StreamingResponse(iter(parts), media_type=request.headers["content-type"])


@app.head("/head")
def head() -> StreamingResponse:
    return StreamingResponse(numbers(5), headers={"X-Head": "yes"})


@serve.ingress(app)
class Served: ...


CASES = [
    Case("a generator", "GET", "/sync/10"),
    Case("an empty generator", "GET", "/sync/0"),
    Case("events", "GET", "/events"),
    Case("2 MB", "GET", "/large"),
    Case("with a length", "GET", "/length"),
    Case("with a background task", "GET", "/background"),
    Case("all have ended", "GET", "/ended"),
    Case("an echo", "POST", "/echo", body=Body(b"echo", "text/x-echo")),
    Case("an echo of chunks", "POST", "/echo", body=Body((b"one", b"two"), "text/x-echo")),
    Case("HEAD", "HEAD", "/head"),
    Case("HTTP/1.0", "GET", "/sync/3", version="1.0"),
]
