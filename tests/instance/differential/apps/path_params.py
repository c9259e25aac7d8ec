"""Path parameters of every kind, with and without constraints."""

from datetime import date
from enum import Enum
from typing import Annotated
from uuid import UUID

from fastapi import FastAPI, Path

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()


class Model(Enum):
    SMALL = "small"
    LARGE = "large"


@app.get("/ints/{number}")
def ints(number: int) -> dict[str, int]:
    return {"number": number}


@app.get("/floats/{number:float}")
def floats(number: float) -> float:
    return number


@app.get("/models/{model}")
async def models(model: Model) -> str:
    return model.name


@app.get("/ids/{id}/on/{day}")
async def ids(id: UUID, day: date) -> dict[str, str]:  # noqa: A002
    return {"id": str(id), "day": day.isoformat()}


@app.get("/users/me")
def me() -> str:
    return "me"


@app.get("/users/{name}")
def user(name: str) -> str:
    return name


@app.get("/files/{path:path}")
def files(path: str) -> str:
    return path


@app.get("/bounded/{number}")
def bounded(number: Annotated[int, Path(ge=1, le=10, title="From one to ten")]) -> int:
    return number


@serve.ingress(app)
class Served: ...


CASES = [
    Case("an integer", "GET", "/ints/3"),
    Case("not an integer", "GET", "/ints/three"),
    Case("a huge integer", "GET", "/ints/123456789012345678901234567890"),
    Case("a float by convertor", "GET", "/floats/3.5"),
    Case("no float by convertor", "GET", "/floats/x"),
    Case("an enum", "GET", "/models/large"),
    Case("not of the enum", "GET", "/models/huge"),
    Case("uuid and date", "GET", "/ids/6f1f1f5e-7d0c-4f0f-8c8e-2f9b6f8f2a11/on/2024-02-29"),
    Case("neither uuid nor date", "GET", "/ids/x/on/2023-02-29"),
    Case("the first route wins", "GET", "/users/me"),
    Case("the other route", "GET", "/users/ada"),
    Case("a path", "GET", "/files/a/b//c.txt"),
    Case("an empty path", "GET", "/files/"),
    Case("an encoded slash", "GET", "/users/a%2Fb"),
    Case("an encoded slash in a path", "GET", "/files/a%2Fb"),
    Case("dots stay", "GET", "/files/../x/./y"),
    Case("within bounds", "GET", "/bounded/10"),
    Case("out of bounds", "GET", "/bounded/11"),
    Case("unknown path", "GET", "/nowhere"),
    Case("known path, other method", "POST", "/users/me"),
]
