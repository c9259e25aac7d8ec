"""Forms, URL-encoded and multipart."""

from typing import Annotated

from fastapi import FastAPI, Form, Request
from pydantic import BaseModel

from qserve import serve
from tests.instance.differential.case import Body, Case, as_form, as_json, as_multipart

app = FastAPI()


class Login(BaseModel):
    model_config = {"extra": "forbid"}

    username: str
    password: str


@app.post("/fields")
def fields(username: Annotated[str, Form()], age: Annotated[int, Form()] = 0) -> dict[str, object]:
    return {"username": username, "age": age}


@app.post("/model")
def model(login: Annotated[Login, Form()]) -> Login:
    return login


@app.post("/lists")
def lists(x: Annotated[list[str], Form()]) -> list[str]:
    return x


@app.post("/raw")
async def raw(request: Request) -> list[tuple[str, str]]:
    async with request.form() as form:
        return [(name, str(value)) for name, value in form.multi_items()]


@serve.ingress(app)
class Served: ...


CASES = [
    Case("URL-encoded", "POST", "/fields", body=as_form(username="J\u00fcrgen & Co", age="3")),
    Case("multipart", "POST", "/fields", body=as_multipart(("username", "ada"), ("age", "3"))),
    Case("missing", "POST", "/fields", body=as_form(age="3")),
    Case("wrong", "POST", "/fields", body=as_form(username="x", age="old")),
    Case("JSON instead", "POST", "/fields", body=as_json({"username": "x"})),
    Case("no body", "POST", "/fields"),
    Case("model", "POST", "/model", body=as_form(username="a", password="b")),
    Case("model with too much", "POST", "/model", body=as_form(username="a", password="b", extra="c")),
    Case("a list", "POST", "/lists", body=Body(b"x=1&x=2&x=%E2%82%AC", "application/x-www-form-urlencoded")),
    Case("raw", "POST", "/raw", body=Body(b"a=1&b=&c&a=2+3", "application/x-www-form-urlencoded")),
    Case("broken multipart", "POST", "/raw", body=Body(b"--x\r\nnonsense", "multipart/form-data; boundary=x")),
    Case("multipart without a boundary", "POST", "/raw", body=Body(b"--x--", "multipart/form-data")),
]
