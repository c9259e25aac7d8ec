"""GZipMiddleware, and answers that are compressed already."""

import gzip
from collections.abc import Iterator

from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from starlette.middleware.gzip import GZipMiddleware

from qserve import serve
from tests.instance.differential.case import Body, Case

app = FastAPI()
app.add_middleware(GZipMiddleware, minimum_size=500, compresslevel=5)


@app.get("/text/{size}")
def text(size: int) -> Response:
    return Response("x" * size, media_type="text/plain", headers={"Vary": "Accept"})


@app.get("/stream")
def stream() -> StreamingResponse:
    def parts() -> Iterator[str]:
        for number in range(50):
            yield f"{number} "

    return StreamingResponse(parts(), media_type="text/plain")


@app.get("/ready")
def ready() -> Response:
    return Response(gzip.compress(b"y" * 1000, mtime=0), headers={"Content-Encoding": "gzip"}, media_type="text/plain")


@serve.ingress(app)
class Served: ...


GZIP = {"Accept-Encoding": "gzip, deflate"}
CASES = [
    Case("compressed", "GET", "/text/2000", GZIP),
    Case("too small", "GET", "/text/100", GZIP),
    Case("not accepted", "GET", "/text/2000", {"Accept-Encoding": "br"}),
    Case("a stream", "GET", "/stream", GZIP),
    Case("compressed already", "GET", "/ready", GZIP),
    Case("HEAD is not allowed", "HEAD", "/text/2000", GZIP),
    Case("a compressed request", "POST", "/text/1", {"Content-Encoding": "gzip"}, Body(gzip.compress(b"{}", mtime=0))),
]
