"""Dependencies that clean up after the request: order, exceptions, both kinds of functions."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi.responses import StreamingResponse

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()
log: list[str] = []


class OwnError(Exception): ...


async def outer() -> AsyncIterator[str]:
    log.append("outer begins")
    try:
        yield "outer"
    except OwnError as exc:
        log.append("outer saw it")
        raise HTTPException(409, "an own error") from exc
    finally:
        log.append("outer ends")


def inner(value: Annotated[str, Depends(outer)]) -> Iterator[str]:
    log.append("inner begins")
    try:
        yield f"{value} inner"
    finally:
        log.append("inner ends")


@app.get("/fine")
def fine(value: Annotated[str, Depends(inner)]) -> str:
    log.append("fine")
    return value


@app.get("/refused")
def refused(value: Annotated[str, Depends(inner)]) -> str:
    raise HTTPException(418, value)


@app.get("/own-error")
def own_error(value: Annotated[str, Depends(inner)]) -> str:
    raise OwnError(value)


@app.get("/bug")
async def bug(value: Annotated[str, Depends(inner)]) -> str:
    raise KeyError(value)


@app.get("/stream")
def stream(value: Annotated[str, Depends(inner)]) -> StreamingResponse:
    def parts() -> Iterator[str]:
        log.append("streams")
        yield value

    return StreamingResponse(parts())


@app.get("/log")
async def read_log(response: Response) -> list[str]:
    # What is over for the client may not be over here.
    while log.count("outer begins") > log.count("outer ends"):  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    found = log.copy()
    log.clear()
    return found


@serve.ingress(app)
class Served: ...


CASES = [
    Case("fine", "GET", "/fine"),
    Case("fine, log", "GET", "/log"),
    Case("refused", "GET", "/refused"),
    Case("refused, log", "GET", "/log"),
    Case("an error that a dependency translates", "GET", "/own-error"),
    Case("an error that a dependency translates, log", "GET", "/log"),
    Case("a bug", "GET", "/bug"),
    Case("a bug, log", "GET", "/log"),
    Case("a stream", "GET", "/stream"),
    Case("a stream, log", "GET", "/log"),
]
