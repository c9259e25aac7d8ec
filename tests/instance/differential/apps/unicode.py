"""Paths outside ASCII, and percent signs of every kind."""

from fastapi import FastAPI, Request

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()


@app.get("/caf\u00e9/{name}")
def cafe(name: str, request: Request) -> list[str]:
    return [name, str(request.url), str(request.url_for("cafe", name="\u00fc"))]


@app.get("/{rest:path}")
def rest(rest: str, request: Request) -> list[str]:
    return [rest, request.scope["raw_path"].decode("latin-1"), request.url.path]


@serve.ingress(app)
class Served: ...


CASES = [
    Case("a route outside ASCII", "GET", "/caf%C3%A9/%E2%82%AC"),
    Case("in lower-case hex", "GET", "/caf%c3%a9/x"),
    Case("a redirect there", "GET", "/caf%C3%A9/x/"),
    Case("emoji", "GET", "/%F0%9F%98%80/x"),
    Case("no valid UTF-8", "GET", "/%FF%FE"),
    Case("a percent sign", "GET", "/100%25"),
    Case("twice encoded", "GET", "/a%252Fb"),
    Case("an incomplete escape", "GET", "/a%2"),
    Case("reserved characters", "GET", "/a;b=c,d:e@f!$'()*+~"),
    Case("an encoded question mark", "GET", "/a%3Fb?c"),
    Case("encoded dots", "GET", "/a/%2e%2e/b"),
    Case("a plus", "GET", "/a+b"),
]
