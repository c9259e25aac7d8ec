"""Response models and what they leave out."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, computed_field

from qserve import serve
from tests.instance.differential.case import Case, as_json

app = FastAPI()


class Base(BaseModel):
    name: str


class UserIn(Base):
    password: str


class Item(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    name: str
    price: float = Field(default=10.5, alias="thePrice")
    note: str | None = None
    tags: list[str] = []

    @computed_field  # type: ignore[prop-decorator]
    @property
    def label(self) -> str:
        return f"{self.name}!"


@app.post("/users", response_model=Base, status_code=201)
def create(user: UserIn) -> Any:
    return user


@app.post("/annotated")
def annotated(user: UserIn) -> Base:
    return user


@app.get("/unset", response_model=Item, response_model_exclude_unset=True)
def unset() -> Any:
    return Item(name="x", tags=[])


@app.get("/none", response_model=Item, response_model_exclude_none=True, response_model_by_alias=False)
def none() -> Any:
    return {"name": "x", "thePrice": 2}


@app.get("/included", response_model=Item, response_model_include={"name", "label"})
def included() -> Any:
    return Item(name="x")


@app.get("/excluded", response_model=Item, response_model_exclude={"tags"})
def excluded() -> Any:
    return Item(name="x")


@app.get("/list")
def many() -> list[Item]:
    return [Item(name="a"), Item(name="b", note="n")]


@app.get("/either/{kind}")
def either(kind: str) -> Item | Base:
    return Item(name="i") if kind == "item" else Base(name="b")


@app.get("/nothing", response_model=None)
def nothing() -> Any:
    return None


@serve.ingress(app)
class Served: ...


CASES = [
    Case("filtered", "POST", "/users", body=as_json({"name": "a", "password": "b"})),
    Case("filtered by annotation", "POST", "/annotated", body=as_json({"name": "a", "password": "b"})),
    Case("without what was not set", "GET", "/unset"),
    Case("without None, by name", "GET", "/none"),
    Case("included", "GET", "/included"),
    Case("excluded", "GET", "/excluded"),
    Case("a list", "GET", "/list"),
    Case("a union, first", "GET", "/either/item"),
    Case("a union, second", "GET", "/either/base"),
    Case("nothing", "GET", "/nothing"),
]
