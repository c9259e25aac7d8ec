"""Headers that a proxy in front sets, in the eyes of the application."""

from fastapi import FastAPI, Request

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()


@app.get("/")
def root(request: Request) -> list[object]:
    assert request.client is not None
    return [request.client.host, request.url.scheme, request.headers.get("x-forwarded-for")]


@serve.ingress(app)
class Served: ...


CASES = [
    Case("none", "GET", "/"),
    Case("X-Forwarded-For and -Proto", "GET", "/", {"X-Forwarded-For": "10.1.2.3", "X-Forwarded-Proto": "https"}),
    Case("X-Forwarded-Host", "GET", "/", {"X-Forwarded-Host": "outside.example"}),
    Case("Forwarded", "GET", "/", {"Forwarded": "for=10.1.2.3;proto=https"}),
]
