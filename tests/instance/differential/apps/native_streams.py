"""FastAPI's own streams: JSON lines and server-sent events out of generator endpoints."""

from collections.abc import AsyncIterator, Iterator

from fastapi import FastAPI
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()


class Item(BaseModel):
    name: str


@app.get("/lines")
async def lines() -> AsyncIterator[Item]:
    for name in "abc":
        yield Item(name=name)


@app.get("/events", response_class=EventSourceResponse)
def events() -> Iterator[ServerSentEvent]:
    yield ServerSentEvent(data={"first": 1}, event="start", id="1")
    yield ServerSentEvent(comment="still here")
    yield ServerSentEvent(raw_data="last")


@app.get("/models", response_class=EventSourceResponse)
async def models() -> AsyncIterator[Item]:
    yield Item(name="x")


@serve.ingress(app)
class Served: ...


CASES = [
    Case("JSON lines", "GET", "/lines"),
    Case("events", "GET", "/events"),
    Case("events of models", "GET", "/models"),
    Case("described", "GET", "/openapi.json"),
]
