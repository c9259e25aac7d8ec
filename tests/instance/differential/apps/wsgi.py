"""A WSGI application, mounted."""

import json
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from fastapi import FastAPI

from qserve import serve
from tests.instance.differential.case import Body, Case

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated, and used all the same
    from starlette.middleware.wsgi import WSGIMiddleware

NAMES = ("REQUEST_METHOD", "SCRIPT_NAME", "PATH_INFO", "QUERY_STRING", "HTTP_HOST", "CONTENT_TYPE", "wsgi.url_scheme")


def wsgi(environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], Any]) -> Iterable[bytes]:
    if environ["PATH_INFO"] == "/fail":
        raise RuntimeError("in WSGI")
    body = environ["wsgi.input"].read().decode()
    told = {name: environ.get(name) for name in NAMES}
    start_response("203 Fine", [("Content-Type", "application/json"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")])
    return [json.dumps(told).encode(), b"\n", body.encode()]


app = FastAPI()


@app.get("/api")
def api() -> str:
    return "api"


app.mount("/old", WSGIMiddleware(wsgi))


@serve.ingress(app)
class Served: ...


CASES = [
    Case("GET", "GET", "/old/a%20b/c?x=%20"),
    Case("POST", "POST", "/old/post", body=Body(b"posted", "text/plain")),
    Case("an exception", "GET", "/old/fail"),
    Case("beside it", "GET", "/api"),
]
