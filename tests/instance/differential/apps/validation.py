"""Validation errors answered by the application's own handlers, and answers that do not fit their model."""

from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, field_validator, model_validator

from qserve import serve
from tests.instance.differential.case import Body, Case, as_json

app = FastAPI()


@app.exception_handler(RequestValidationError)
async def invalid(request: Request, exc: RequestValidationError) -> JSONResponse:
    errors = [{key: value for key, value in error.items() if key != "ctx"} for error in exc.errors()]
    return JSONResponse({"errors": jsonable_encoder(errors), "path": request.url.path}, 400, {"X-Invalid": "yes"})


class Range(BaseModel):
    first: int
    last: int

    @field_validator("first")
    @classmethod
    def positive(cls, value: int) -> int:
        if value < 0:
            raise ValueError("must not be negative")
        return value

    @model_validator(mode="after")
    def ordered(self) -> "Range":
        assert self.first <= self.last, "first is after last"
        return self


class Answer(BaseModel):
    value: int


def even(value: int) -> int:
    if value % 2:
        raise ValueError(f"{value} is odd")
    return value


@app.post("/ranges")
def ranges(range_: Range) -> Range:
    return range_


@app.get("/even")
def evens(number: Annotated[int, Query(), AfterValidator(even)]) -> int:
    return number


@app.get("/bad-answer", response_model=Answer)
def bad_answer() -> Any:
    return {"value": "no number"}


@app.get("/raised")
def raised() -> None:
    raise HTTPException(422, [{"loc": ["own"], "msg": "made by hand"}])


@serve.ingress(app)
class Served: ...


CASES = [
    Case("valid", "POST", "/ranges", body=as_json({"first": 1, "last": 2})),
    Case("field validator", "POST", "/ranges", body=as_json({"first": -1, "last": 2})),
    Case("model validator", "POST", "/ranges", body=as_json({"first": 3, "last": 2})),
    Case("no JSON", "POST", "/ranges", body=Body(b"{", "application/json")),
    Case("annotated validator", "GET", "/even?number=3"),
    Case("an answer that is not valid", "GET", "/bad-answer"),
    Case("a 422 made by hand", "GET", "/raised"),
]
