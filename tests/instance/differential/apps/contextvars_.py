"""Context variables set by the module, middleware, dependencies and the application's start."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Annotated

from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from qserve import serve
from tests.instance.differential.case import Case

user: ContextVar[str] = ContextVar("user", default="nobody")
steps: ContextVar[list[str]] = ContextVar("steps")
imported: ContextVar[str] = ContextVar("imported", default="nowhere")
imported.set("by the module")


class SetUser:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            names = [value.decode() for name, value in scope["headers"] if name == b"x-user"]
            if names:
                user.set(names[0])
            steps.set(["middleware"])
        await self.app(scope, receive, send)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    user.set("left by the start")
    yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(SetUser)


async def depend() -> str:
    steps.get().append("async dependency")
    return user.get()


def depend_sync() -> str:
    steps.get().append("sync dependency")
    return user.get()


@app.get("/sync")
def sync(one: Annotated[str, Depends(depend)], two: Annotated[str, Depends(depend_sync)]) -> list[object]:
    return [one, two, user.get(), steps.get()]


@app.get("/async")
async def asynchronous() -> str:
    found = user.get()
    user.set("left by a request")
    return found


@app.get("/imported")
def from_the_module() -> str:
    return imported.get()


@app.get("/imported-async")
async def from_the_module_too() -> str:
    return imported.get()


@app.get("/stream")
def stream() -> StreamingResponse:
    async def parts() -> AsyncIterator[str]:
        yield user.get()

    return StreamingResponse(parts())


@serve.ingress(app)
class Served: ...


CASES = [
    Case("in threads", "GET", "/sync", {"X-User": "ada"}),
    Case("on the loop", "GET", "/async", {"X-User": "bob"}),
    Case("set by the module", "GET", "/imported"),
    Case("set by the module, on the loop", "GET", "/imported-async"),
    Case("in a stream", "GET", "/stream", {"X-User": "eve"}),
    Case("nothing is left by requests", "GET", "/async"),
    Case("nor by that one", "GET", "/sync"),
]
