"""Security by API keys in header, query and cookie."""

from typing import Annotated

from fastapi import FastAPI, HTTPException, Security
from fastapi.security import APIKeyCookie, APIKeyHeader, APIKeyQuery

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()
by_header = APIKeyHeader(name="X-Api-Key")
by_query = APIKeyQuery(name="key", auto_error=False)
by_cookie = APIKeyCookie(name="key")


@app.get("/header")
def header(key: Annotated[str, Security(by_header)]) -> str:
    if key != "right":
        raise HTTPException(403, "wrong key")
    return key


@app.get("/query")
def query(key: Annotated[str | None, Security(by_query)]) -> str | None:
    return key


@app.get("/cookie")
def cookie(key: Annotated[str, Security(by_cookie)]) -> str:
    return key


@serve.ingress(app)
class Served: ...


CASES = [
    Case("header", "GET", "/header", {"X-Api-Key": "right"}),
    Case("header, wrong", "GET", "/header", {"X-Api-Key": "wrong"}),
    Case("header, none", "GET", "/header"),
    Case("query", "GET", "/query?key=k"),
    Case("query, none", "GET", "/query"),
    Case("cookie", "GET", "/cookie", {"Cookie": "key=k"}),
    Case("cookie, none", "GET", "/cookie"),
    Case("described", "GET", "/openapi.json"),
]
