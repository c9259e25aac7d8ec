"""docs, redoc and openapi.json where nothing is said about them."""

from typing import Annotated

from fastapi import FastAPI, Header, Path
from pydantic import BaseModel, Field

from qserve import serve
from tests.instance.differential.case import Case, as_json

app = FastAPI(
    title="Documented",
    version="2.1",
    summary="A summary",
    description="*Text*",
    contact={"name": "Ada", "url": "https://ada.example"},
    license_info={"name": "MIT"},
    openapi_tags=[{"name": "things", "description": "All of them"}],
)


class Thing(BaseModel):
    """A thing."""

    name: str = Field(description="Its name", examples=["x"])
    parent: "Thing | None" = None


@app.post("/things/{number}", tags=["things"], summary="Make one", response_description="It", responses={409: {}})
def make(number: Annotated[int, Path(gt=0)], thing: Thing, x_token: Annotated[str | None, Header()] = None) -> Thing:
    """Makes a thing.

    With *markdown*.
    """
    return thing


@app.get("/hidden", include_in_schema=False)
def hidden() -> str:
    return "hidden"


@serve.ingress(app)
class Served: ...


CASES = [
    Case("docs", "GET", "/docs"),
    Case("docs, HEAD", "HEAD", "/docs"),
    Case("redoc", "GET", "/redoc"),
    Case("the redirect page", "GET", "/docs/oauth2-redirect"),
    Case("openapi.json", "GET", "/openapi.json"),
    Case("openapi.json again", "GET", "/openapi.json"),
    Case("hidden", "GET", "/hidden"),
    Case("a model that holds itself", "POST", "/things/1", body=as_json({"name": "a", "parent": {"name": "b"}})),
]
