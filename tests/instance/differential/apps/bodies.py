"""JSON bodies: models, nesting, several bodies, what is no JSON."""

from typing import Annotated, Any

from fastapi import Body, FastAPI
from pydantic import BaseModel, Field

from qserve import serve
from tests.instance.differential import case
from tests.instance.differential.case import Case, as_json

app = FastAPI()


class Image(BaseModel):
    url: str
    width: int = 100


class Item(BaseModel):
    name: str = Field(min_length=1)
    price: float = Field(gt=0)
    tags: set[str] = set()
    image: Image | None = None


class User(BaseModel):
    name: str


@app.post("/items")
async def create(item: Item) -> Item:
    return item


@app.put("/items/{number}")
def update(number: int, item: Item, user: User, importance: Annotated[int, Body()], q: str = "") -> dict[str, Any]:
    return {"number": number, "item": item, "user": user, "importance": importance, "q": q}


@app.post("/embedded")
def embedded(item: Annotated[Item, Body(embed=True)]) -> str:
    return item.name


@app.post("/images")
def images(images: list[Image]) -> int:
    return len(images)


@app.post("/weights")
def weights(weights: dict[int, float]) -> dict[int, float]:
    return weights


@app.post("/text")
def text(text: Annotated[str, Body(media_type="text/plain")]) -> str:
    return text


@app.post("/optional")
def optional(item: Item | None = None) -> bool:
    return item is None


@serve.ingress(app)
class Served: ...


ITEM = {"name": "Foo", "price": 1.5, "tags": ["a", "a"], "image": {"url": "http://x"}}
NON_ASCII = '{"name":"J\u00fcrgen \u20ac \U0001f600","price":1}'
CASES = [
    Case("a model", "POST", "/items", body=as_json(ITEM)),
    Case("several things wrong", "POST", "/items", body=as_json({"name": "", "price": -1, "image": {}})),
    Case("no JSON", "POST", "/items", body=case.Body(b'{"name": ', "application/json")),
    Case("a JSON string", "POST", "/items", body=as_json("text")),
    Case("no body", "POST", "/items"),
    Case("an empty body", "POST", "/items", body=case.Body(b"", "application/json")),
    Case("no content type", "POST", "/items", body=case.Body(b'{"name": "x", "price": 1}')),
    Case("another content type", "POST", "/items", body=case.Body(b'{"name": "x", "price": 1}', "text/plain")),
    Case("a JSON-like type", "POST", "/items", body=case.Body(b'{"name":"x","price":1}', "application/vnd.api+json")),
    Case("not UTF-8", "POST", "/items", body=case.Body(b'{"name": "\xff"}', "application/json")),
    Case("non-ASCII", "POST", "/items", body=case.Body(NON_ASCII.encode(), "application/json")),
    Case("several bodies", "PUT", "/items/3?q=x", body=as_json({"item": ITEM, "user": {"name": "u"}, "importance": 5})),
    Case("one body missing", "PUT", "/items/3", body=as_json({"item": ITEM, "user": {"name": "u"}})),
    Case("embedded", "POST", "/embedded", body=as_json({"item": ITEM})),
    Case("a list", "POST", "/images", body=as_json([{"url": "a"}, {"url": "b"}])),
    Case("a dict with wrong keys", "POST", "/weights", body=as_json({"1": 2, "x": 3})),
    Case("plain text", "POST", "/text", body=case.Body(b"hello", "text/plain")),
    Case("optional and absent", "POST", "/optional"),
    Case("chunked", "POST", "/items", body=case.Body((b'{"name": "x",', b' "price": 2}'), "application/json")),
]
