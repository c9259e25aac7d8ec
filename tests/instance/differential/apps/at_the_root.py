"""An application without a prefix, beside others that have one."""

from fastapi import FastAPI, Request

from qserve import serve
from tests.instance.differential.case import Case

PREFIX = "/"

app = FastAPI(title="At the root")


@app.get("/")
def root(request: Request) -> list[str]:
    return [str(request.url), str(request.base_url), request.scope["root_path"], request.scope["path"]]


@app.get("/users/{name}")
def user(name: str) -> str:
    return name


@serve.ingress(app)
class Served: ...


CASES = [
    Case("the root", "GET", "/"),
    Case("a route", "GET", "/users/x"),
    Case("a slash too many", "GET", "/users/x/"),
    Case("404", "GET", "/nowhere"),
    Case("openapi.json tells no servers", "GET", "/openapi.json"),
    Case("docs", "GET", "/docs"),
    Case("redoc", "GET", "/redoc"),
    Case("a path that begins like a prefix", "GET", "/corse"),
    Case("two slashes", "GET", "//"),
]
