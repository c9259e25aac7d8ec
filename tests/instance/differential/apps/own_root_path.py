"""FastAPI's deprecated way to say the prefix, the same that it is deployed under."""

import warnings

from fastapi import FastAPI, Request

from qserve import serve
from tests.instance.differential.case import Case

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated, and used all the same
    app = FastAPI(root_path="/own_root_path")


@app.get("/here", name="here")
def here(request: Request) -> list[str]:
    return [request.scope["root_path"], request.scope["path"], str(request.url_for("here"))]


@serve.ingress(app)
class Served: ...


CASES = [
    Case("a route", "GET", "/here"),
    Case("its slash", "GET", "/here/"),
    Case("openapi.json", "GET", "/openapi.json"),
    Case("docs", "GET", "/docs"),
]
