"""Header parameters, repeated headers, and what a request's headers look like to the app."""

from typing import Annotated

from fastapi import FastAPI, Header, Request
from pydantic import BaseModel

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()


class Common(BaseModel):
    host: str
    save_data: bool
    x_tag: list[str] = []


@app.get("/one")
def one(user_agent: Annotated[str | None, Header()] = None) -> dict[str, str | None]:
    return {"user_agent": user_agent}


@app.get("/required")
def required(x_token: Annotated[int, Header()]) -> int:
    return x_token


@app.get("/several")
def several(x_token: Annotated[list[str] | None, Header()] = None) -> list[str] | None:
    return x_token


@app.get("/underscores")
def underscores(strange_name: Annotated[str, Header(convert_underscores=False)]) -> str:
    return strange_name


@app.get("/model")
def model(headers: Annotated[Common, Header()]) -> Common:
    return headers


@app.get("/all")
async def everything(request: Request) -> list[tuple[str, str]]:
    return request.headers.items()


@serve.ingress(app)
class Served: ...


CASES = [
    Case("given", "GET", "/one", {"User-Agent": "test/1"}),
    Case("absent", "GET", "/one"),
    Case("required and absent", "GET", "/required"),
    Case("of the wrong type", "GET", "/required", {"X-Token": "x"}),
    Case("repeated", "GET", "/several", (("X-Token", "b"), ("X-Token", "a"), ("x-token", "c, d"))),
    Case("underscores", "GET", "/underscores", {"strange_name": "yes"}),
    Case("model", "GET", "/model", (("Save-Data", "on"), ("X-Tag", "1"), ("X-Tag", "2"))),
    Case("all, in order", "GET", "/all", (("X-B", "1"), ("X-A", " 2 "), ("X-B", "3"), ("Accept", "*/*"))),
    Case("empty value", "GET", "/all", {"X-Empty": ""}),
    Case("Latin-1 value", "GET", "/all", {"X-Name": "J\u00fcrgen"}),
    Case("connection ends at the gateway", "GET", "/all", {"Connection": "keep-alive", "TE": "trailers"}),
    Case("conditional and range headers", "GET", "/all", {"If-None-Match": '"x"', "Range": "bytes=0-1"}),
    Case("the client's request id", "GET", "/all", {"X-Request-Id": "mine-1"}),
    Case("forwarded headers", "GET", "/all", {"X-Forwarded-For": "10.1.2.3", "X-Forwarded-Proto": "http"}),
]
