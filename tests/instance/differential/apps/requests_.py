"""The Request object: client, body, stream, JSON, form, state, disconnection."""

import asyncio

from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect

from qserve import serve
from tests.instance.differential.case import Body, Case, as_form, as_json

app = FastAPI()


@app.get("/client")
def client(request: Request) -> list[object]:
    assert request.client is not None
    return [request.client.host, isinstance(request.client.port, int), len(request.scope["client"])]


@app.api_route("/stream", methods=["GET", "POST"])
async def stream(request: Request) -> list[object]:
    parts = [part async for part in request.stream()]
    return [b"".join(parts).decode(), parts[-1] == b""]


@app.post("/twice")
async def twice(request: Request) -> list[object]:
    return [(await request.body()).decode(), await request.json(), (await request.body()).decode()]


@app.post("/after-stream")
async def after_stream(request: Request) -> str:
    async for _ in request.stream():
        pass
    try:
        return (await request.body()).decode()
    except RuntimeError as exc:
        return str(exc)


@app.post("/unread")
async def unread() -> str:
    return "never read"


@app.post("/connected")
async def connected(request: Request) -> list[bool]:
    await request.body()  # first: is_disconnected() would swallow it
    before = await request.is_disconnected()
    await asyncio.sleep(0.05)
    return [before, await request.is_disconnected()]


@app.post("/receive")
async def receive(request: Request) -> list[object]:
    message = await request.receive()
    waiting = asyncio.ensure_future(request.receive())
    done, _ = await asyncio.wait({waiting}, timeout=0.1)
    waiting.cancel()
    return [message["type"], message["body"].decode(), message.get("more_body", False), len(done)]


@app.post("/form")
async def form(request: Request) -> list[object]:
    try:
        return [(await request.form()).multi_items(), (await request.body()).decode()]
    except (RuntimeError, ClientDisconnect) as exc:
        return [type(exc).__name__]


@app.get("/types")
async def types(request: Request) -> list[object]:
    scope = request.scope
    return [
        type(scope["headers"]).__name__,
        sorted({type(part).__name__ for pair in scope["headers"] for part in pair}),
        [type(scope[name]).__name__ for name in ("path", "raw_path", "query_string", "root_path", "state")],
        scope["asgi"]["version"],
        request.state.__class__.__name__,
    ]


@serve.ingress(app)
class Served: ...


CASES = [
    Case("client", "GET", "/client"),
    Case("stream", "POST", "/stream", body=Body(b"streamed")),
    Case("stream of chunks", "POST", "/stream", body=Body((b"one", b"two", b"three"))),
    Case("stream without a body", "POST", "/stream"),
    Case("stream of an empty body", "POST", "/stream", body=Body(b"")),
    Case("stream of a GET", "GET", "/stream", body=Body(b"of a GET")),
    Case("body and JSON", "POST", "/twice", body=as_json({"a": 1})),
    Case("body that is no JSON", "POST", "/twice", body=Body(b"{")),
    Case("body after stream", "POST", "/after-stream", body=Body(b"x")),
    Case("unread", "POST", "/unread", body=Body(b"x" * 10_000)),
    Case("still connected", "POST", "/connected", body=Body(b"x")),
    Case("raw messages", "POST", "/receive", body=Body(b"x")),
    Case("body after form", "POST", "/form", body=as_form(a="1")),
    Case("types of the scope", "GET", "/types"),
]
