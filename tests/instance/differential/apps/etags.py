"""Conditional requests answered by the application."""

import hashlib

from fastapi import FastAPI, Request, Response

from qserve import serve
from tests.instance.differential.case import Body, Case

app = FastAPI()
documents = {"a": b"first"}


def tag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


@app.get("/documents/{name}")
def read(name: str, request: Request) -> Response:
    headers = {"ETag": tag(documents[name]), "Cache-Control": "private", "Vary": "Cookie"}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(documents[name], headers=headers, media_type="text/plain")


@app.put("/documents/{name}")
async def write(name: str, request: Request) -> Response:
    if request.headers.get("if-match") not in {tag(documents.get(name, b"")), "*"}:
        return Response(status_code=412)
    documents[name] = await request.body()
    return Response(status_code=204, headers={"ETag": tag(documents[name])})


@serve.ingress(app)
class Served: ...


CASES = [
    Case("read", "GET", "/documents/a"),
    Case("not modified", "GET", "/documents/a", {"If-None-Match": tag(b"first")}),
    Case("write, wrong tag", "PUT", "/documents/a", {"If-Match": '"x"'}, Body(b"second")),
    Case("write", "PUT", "/documents/a", {"If-Match": tag(b"first")}, Body(b"second")),
    Case("modified", "GET", "/documents/a", {"If-None-Match": tag(b"first")}),
    Case("no such document", "GET", "/documents/b"),
]
