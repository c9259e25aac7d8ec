"""Deployments whose every kind of call raises what it is told to. Travels by value."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any

from fastapi import FastAPI, Request, WebSocket
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse, StreamingResponse

from qserve import serve

SLOTS = 3


class PanicException(BaseException):
    """As the extensions that Rust code is built into raise it."""


class Unspeakable(Exception):
    """An exception that cannot even be described."""

    def __str__(self) -> str:
        raise SystemExit("no text")

    def __reduce__(self) -> Any:
        raise PanicException("no pickle")


RAISED: dict[str, type[BaseException]] = {
    cls.__name__: cls
    for cls in (
        *(ZeroDivisionError, RecursionError, StopIteration, StopAsyncIteration, TimeoutError, Unspeakable),
        *(PanicException, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError),
    )
}


def throw(name: str) -> Any:
    """Raise an exception of that name."""
    raise RAISED[name]("on purpose")


class Unpackable:
    """A value that raises when it is packed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> Any:
        throw(self.name)


class Meeting:
    """Lets nobody go before everybody is there: so many calls run at once, and not one fewer."""

    def __init__(self) -> None:
        self._barrier = asyncio.Barrier(SLOTS)

    async def join(self) -> str:
        """Wait for the others."""
        async with asyncio.timeout(10):
            await self._barrier.wait()
        return "met"


class Raiser:
    """A plain deployment."""

    def __init__(self) -> None:
        self.meeting = Meeting()

    async def meet(self) -> str:
        return await self.meeting.join()

    async def __call__(self, request: Request) -> Any:
        return throw(request.query_params["error"])

    async def coroutine(self, name: str) -> Any:
        return throw(name)

    def thread(self, name: str) -> Any:
        return throw(name)

    def awaitable(self, name: str) -> Awaitable[Any]:
        return self.coroutine(name)

    async def task(self, name: str) -> Any:
        return await asyncio.create_task(self.coroutine(name))

    def generator(self, name: str) -> Iterator[int]:
        yield 1
        throw(name)

    async def async_generator(self, name: str) -> AsyncIterator[int]:
        yield 1
        throw(name)

    @serve.batch(max_batch_size=2)
    async def batch(self, names: list[str]) -> list[Any]:
        return [throw(name) for name in names]

    async def result(self, name: str) -> Any:
        return Unpackable(name)


class OnThread:
    """A deployment that has only `def` methods."""

    def __call__(self, name: str) -> Any:
        return "met" if name == "meet" else throw(name)


app = FastAPI()
_meeting: list[Meeting] = []


@app.middleware("http")
async def in_middleware(request: Request, call_next: Any) -> Any:
    if request.url.path.endswith("/middleware"):
        throw(request.query_params["error"])
    return await call_next(request)


@app.get("/meet")
async def meet() -> str:
    if not _meeting:
        _meeting.append(Meeting())
    return await _meeting[0].join()


@app.get("/middleware")
@app.get("/endpoint")
async def endpoint(error: str) -> Any:
    return throw(error)


@app.get("/def")
def def_endpoint(error: str) -> Any:
    return throw(error)


@app.get("/background")
async def background(error: str) -> PlainTextResponse:
    return PlainTextResponse("sent", background=BackgroundTask(throw, error))


@app.get("/stream")
async def stream(error: str) -> StreamingResponse:
    async def parts() -> AsyncIterator[str]:
        yield "first"
        throw(error)

    return StreamingResponse(parts())


@app.websocket("/socket")
async def socket(socket: WebSocket, error: str) -> None:
    await socket.accept()
    throw(error)


@serve.ingress(app)
class Ingress:
    """A deployment with an application."""
