"""Responses of every kind, and response classes of one's own."""

import json
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response

from qserve import serve
from tests.instance.differential.case import Case


class SortedJSON(JSONResponse):
    """Stands for ORJSONResponse and the like."""

    media_type = "application/sorted+json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, sort_keys=True, ensure_ascii=False, indent=1).encode()


app = FastAPI(default_response_class=SortedJSON)


@app.get("/default")
def default() -> dict[str, Any]:
    return {"b": 1, "a": ["\u20ac", None]}


@app.get("/html", response_class=HTMLResponse)
def html() -> str:
    return "<h1>J\u00fcrgen</h1>"


@app.get("/plain", response_class=PlainTextResponse)
def plain() -> str:
    return "plain"


@app.get("/bytes")
def raw() -> Response:
    return Response(b"\x00\xff\r\n\r\n", media_type="application/octet-stream", headers={"X-Raw": "a, b"})


@app.get("/xml")
def xml() -> Response:
    return Response("<a>\u00fc</a>".encode("latin-1"), media_type="application/xml; charset=latin-1")


@app.get("/bare")
def bare() -> Response:
    return Response()


@app.get("/headers")
def headers() -> Response:
    response = PlainTextResponse("x", headers={"X-Latin": "J\u00fcrgen", "Content-Language": "de"})
    response.headers.append("Link", "<a>; rel=next")
    response.headers.append("Link", "<b>; rel=prev")
    response.headers["Content-Length"] = "1"
    return response


@app.get("/redirect", response_class=RedirectResponse, status_code=302)
def redirect() -> str:
    return "https://other.example/\u00fc?x=1 2"


@app.get("/redirect-to-route")
def redirect_to_route() -> RedirectResponse:
    return RedirectResponse(app.url_path_for("plain"))


@serve.ingress(app)
class Served: ...


CASES = [
    Case("the default class", "GET", "/default"),
    Case("HTML", "GET", "/html"),
    Case("plain text", "GET", "/plain"),
    Case("bytes", "GET", "/bytes"),
    Case("another charset", "GET", "/xml"),
    Case("nothing at all", "GET", "/bare"),
    Case("headers", "GET", "/headers"),
    Case("a redirect", "GET", "/redirect"),
    Case("a redirect to a route", "GET", "/redirect-to-route"),
    Case("described", "GET", "/openapi.json"),
]
