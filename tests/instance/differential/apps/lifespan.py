"""A lifespan and the state it leaves."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypedDict

from fastapi import APIRouter, FastAPI, Request

from qserve import serve
from tests.instance.differential.case import Case


class State(TypedDict):
    model: str
    seen: list[str]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[State]:
    app.state.started = "started"
    yield {"model": "loaded", "seen": []}


@asynccontextmanager
async def of_router(app: FastAPI) -> AsyncIterator[dict[str, str]]:
    yield {"router": "its own"}


app = FastAPI(lifespan=lifespan)
router = APIRouter(lifespan=of_router)


@app.get("/state")
def state(request: Request) -> dict[str, object]:
    request.state.seen.append("x")  # shared by all requests
    request.state.mine = "x"  # a request's own
    return {"model": request.state.model, "seen": request.state.seen, "app": request.app.state.started}


@app.get("/left")
def left(request: Request) -> dict[str, object]:
    return {"mine": hasattr(request.state, "mine"), "seen": request.state.seen}


@app.get("/app")
def same_app(request: Request) -> list[object]:
    return [app.state.started, request.app.title, request.app.state is app.state]


@router.get("/router")
def in_router(request: Request) -> str:
    return str(request.state.router)


app.include_router(router)


@serve.ingress(app)
class Served: ...


CASES = [
    Case("state", "GET", "/state"),
    Case("shared state", "GET", "/state"),
    Case("a request's own state", "GET", "/left"),
    Case("state of the application", "GET", "/app"),
    Case("state of a router", "GET", "/router"),
]
