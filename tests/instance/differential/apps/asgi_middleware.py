"""Pure ASGI middleware: changes paths, headers and bodies."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qserve import serve
from tests.instance.differential.case import Body, Case


class Rename:
    """Serves /old/... as /new/..."""

    def __init__(self, app: ASGIApp, old: str, *, new: str) -> None:
        self.app = app
        self.old = old
        self.new = new

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = scope["path"].replace(self.old, self.new)
        await self.app(scope, receive, send)


class Shout:
    """Makes every answer loud, and tells how many parts it had."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def shout(message: Message) -> None:
            if message["type"] == "http.response.body":
                message["body"] = message.get("body", b"").upper()
            elif message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-loud", b"1"), (b"x-loud", b"2")]
            await send(message)

        async def quiet() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                message["body"] = message["body"].lower()
            return message

        await self.app(scope, quiet, shout)


app = FastAPI()
app.add_middleware(Shout)
app.add_middleware(Rename, "/old/", new="/new/")


@app.get("/new/{name}")
def new(name: str, request: Request) -> dict[str, Any]:
    return {"name": name, "path": request.url.path}


@app.post("/echo")
async def echo(request: Request) -> str:
    return (await request.body()).decode()


@app.get("/stream")
def stream() -> StreamingResponse:
    return StreamingResponse(iter([b"one ", b"", b"two"]))


@serve.ingress(app)
class Served: ...


CASES = [
    Case("another path", "GET", "/old/thing"),
    Case("the same path", "GET", "/new/thing"),
    Case("request and response changed", "POST", "/echo", body=Body(b"TeXt")),
    Case("a stream changed", "GET", "/stream"),
    Case("a 404 changed", "GET", "/nowhere"),
]
