"""`@app.middleware("http")`: around everything, 404s and errors too."""

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.background import BackgroundTask

from qserve import serve
from tests.instance.differential.case import Body, Case

app = FastAPI()
Next = Callable[[Request], Awaitable[Response]]


@app.middleware("http")
async def inner(request: Request, call_next: Next) -> Response:
    request.state.seen = ["inner"]
    response = await call_next(request)
    response.headers["X-Order"] = "inner"
    return response


@app.middleware("http")
async def outer(request: Request, call_next: Next) -> Response:
    if request.url.path.endswith("/short"):
        return PlainTextResponse("cut short", 299, background=BackgroundTask(lambda: None))
    if request.url.path.endswith("/body"):
        await request.body()
    try:
        response = await call_next(request)
    except ZeroDivisionError:
        return JSONResponse({"caught": "outside"}, 500)
    response.headers["X-Order"] += ", outer"
    response.headers.append("Set-Cookie", "outer=1")
    return response


@app.get("/")
def root(request: Request) -> list[str]:
    return list(request.state.seen)


@app.post("/body")
async def body(request: Request) -> str:
    return (await request.body()).decode()


@app.get("/divide")
def divide() -> float:
    return 1 / int("0")


@app.get("/stream")
def stream() -> StreamingResponse:
    return StreamingResponse(iter(["a", "b", "c"]), media_type="text/plain")


@serve.ingress(app)
class Served: ...


CASES = [
    Case("around an answer", "GET", "/"),
    Case("around a 404", "GET", "/nowhere"),
    Case("around a 405", "PUT", "/"),
    Case("instead of an answer", "GET", "/short"),
    Case("an exception", "GET", "/divide"),
    Case("read the body before", "POST", "/body", body=Body(b"text")),
    Case("around a stream", "GET", "/stream"),
]
