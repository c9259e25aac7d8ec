"""Query parameters: kinds, defaults, lists, models, aliases, encodings."""

from typing import Annotated

from fastapi import FastAPI, Query, Request
from pydantic import BaseModel, Field

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()


class Filters(BaseModel):
    model_config = {"extra": "forbid"}

    limit: int = Field(100, gt=0, le=100)
    tags: list[str] = []


@app.get("/kinds")
def kinds(number: int, flag: bool = False, text: str | None = None) -> dict[str, object]:
    return {"number": number, "flag": flag, "text": text}


@app.get("/lists")
def lists(q: Annotated[list[int], Query()] = []) -> list[int]:  # noqa: B006
    return q


@app.get("/bounds")
def bounds(q: Annotated[str, Query(alias="item-query", min_length=3, pattern="^[a-z]+$")]) -> str:
    return q


@app.get("/model")
def model(filters: Annotated[Filters, Query()]) -> Filters:
    return filters


@app.get("/raw")
async def raw(request: Request) -> dict[str, object]:
    return {
        "query": str(request.url.query),
        "items": request.query_params.multi_items(),
        "bytes": request.scope["query_string"].decode("latin-1"),
    }


@serve.ingress(app)
class Served: ...


CASES = [
    Case("all given", "GET", "/kinds?number=1&flag=yes&text=hello"),
    Case("defaults", "GET", "/kinds?number=1"),
    Case("missing", "GET", "/kinds"),
    Case("several wrong", "GET", "/kinds?number=x&flag=perhaps"),
    Case("given twice", "GET", "/kinds?number=1&number=2"),
    Case("a list", "GET", "/lists?q=3&q=1&q=2"),
    Case("an empty list", "GET", "/lists"),
    Case("a list with a wrong item", "GET", "/lists?q=3&q=x"),
    Case("alias", "GET", "/bounds?item-query=abc"),
    Case("too short", "GET", "/bounds?item-query=ab"),
    Case("wrong pattern", "GET", "/bounds?item-query=ABC"),
    Case("model", "GET", "/model?limit=3&tags=a&tags=b"),
    Case("model with more than it knows", "GET", "/model?limit=3&other=1"),
    Case("spaces and pluses", "GET", "/raw?a=b+c&d=e%20f&g=h%2Bi"),
    Case("non-ASCII", "GET", "/raw?name=J%C3%BCrgen&%E2%82%AC=1"),
    Case("no valid UTF-8", "GET", "/raw?x=%FF%FE"),
    Case("odd separators", "GET", "/raw?&&a&b=&=c&d=e=f;g"),
    Case("an empty query", "GET", "/raw?"),
]
