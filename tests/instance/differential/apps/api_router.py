"""An APIRouter is an ingress too; plain uvicorn serves it included in an application without settings."""

from fastapi import APIRouter, Depends, FastAPI, Response
from pydantic import BaseModel

from qserve import serve
from tests.instance.differential.case import Case, as_json


class Thing(BaseModel):
    name: str


def mark(response: Response) -> None:
    response.headers["X-Marked"] = "yes"


app = APIRouter(prefix="/v1", tags=["things"], dependencies=[Depends(mark)])


@app.get("/things/{number}")
def get(number: int) -> int:
    return number


@app.post("/things", status_code=201)
def post(thing: Thing) -> Thing:
    return thing


PLAIN = FastAPI()
PLAIN.include_router(app)


@serve.ingress(app)
class Served: ...


CASES = [
    Case("get", "GET", "/v1/things/3"),
    Case("not valid", "GET", "/v1/things/x"),
    Case("post", "POST", "/v1/things", body=as_json({"name": "x"})),
    Case("outside its prefix", "GET", "/things/3"),
    Case("described", "GET", "/openapi.json"),
]
