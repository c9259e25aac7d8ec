"""Large headers, queries and bodies; many of them."""

import hashlib

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

from qserve import serve
from tests.instance.differential.case import Body, Case

app = FastAPI()


@app.get("/headers")
def headers(request: Request) -> dict[str, int]:
    return {name: len(value) for name, value in request.headers.items()}


@app.get("/answer/{count}/{size}")
def answer(count: int, size: int) -> Response:
    return PlainTextResponse("x", headers={f"X-{number}": "v" * size for number in range(count)})


@app.get("/query")
def query(q: str) -> int:
    return len(q)


@app.post("/body")
async def body(request: Request) -> str:
    return hashlib.sha256(await request.body()).hexdigest()


@app.get("/bytes/{size}")
def get_bytes(size: int) -> Response:
    return Response(bytes(range(256)) * (size // 256), media_type="application/octet-stream")


@serve.ingress(app)
class Served: ...


CASES = [
    Case("large headers", "GET", "/headers", {"Cookie": "c" * 4_000, "X-Large": "x" * 8_000}),
    Case("many headers", "GET", "/headers", {f"X-{number}": "v" for number in range(90)}),
    Case("large headers of an answer", "GET", "/answer/4/3000"),
    Case("many headers of an answer", "GET", "/answer/200/10"),
    Case("a long query", "GET", f"/query?q={'x' * 7_000}"),
    Case("a body out of line", "POST", "/body", body=Body(bytes(range(256)) * 2_000)),
    Case("a body of 3 MiB", "POST", "/body", body=Body(b"3" * 3 * 1024 * 1024)),
    Case("a body in many chunks", "POST", "/body", body=Body((b"chunk" * 100,) * 300)),
    Case("an answer out of line", "GET", "/bytes/512000"),
    Case("an answer of 3 MiB", "GET", "/bytes/3145728"),
]
