"""Cookies, in and out."""

from typing import Annotated

from fastapi import Cookie, FastAPI, Response
from pydantic import BaseModel

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()


class Cookies(BaseModel):
    session: str
    tracker: int | None = None


@app.get("/one")
def one(ads: Annotated[str | None, Cookie()] = None) -> str | None:
    return ads


@app.get("/model")
def model(cookies: Annotated[Cookies, Cookie()]) -> Cookies:
    return cookies


@app.get("/set")
def set_several(response: Response) -> str:
    response.set_cookie("first", "1", httponly=True, samesite="strict", path="/cookies")
    response.set_cookie("second", "two words; and a semicolon", max_age=60, secure=True)
    response.set_cookie("first", "2", domain="apps.example")
    response.delete_cookie("third")
    return "set"


@serve.ingress(app)
class Served: ...


CASES = [
    Case("given", "GET", "/one", {"Cookie": "ads=yes; other=1"}),
    Case("absent", "GET", "/one"),
    Case("quoted", "GET", "/one", {"Cookie": 'ads="a b"'}),
    Case("in two headers", "GET", "/one", (("Cookie", "a=1"), ("Cookie", "ads=2"))),
    Case("model", "GET", "/model", {"Cookie": "session=s; tracker=3"}),
    Case("model, wrong", "GET", "/model", {"Cookie": "tracker=x"}),
    Case("several are set", "GET", "/set", mask=r"expires=[^;]+"),
    Case("and come back", "GET", "/one", cookies=True),
]
