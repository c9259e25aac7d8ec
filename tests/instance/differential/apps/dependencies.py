"""Dependencies: nested, cached, classes, of routers and applications, overridden."""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request, Response

from qserve import serve
from tests.instance.differential.case import Case


async def count_calls(request: Request) -> None:
    request.state.calls = getattr(request.state, "calls", 0) + 1


def everywhere(response: Response) -> None:
    response.headers["X-Everywhere"] = "yes"


app = FastAPI(dependencies=[Depends(everywhere)])


class Paging:
    def __init__(self, skip: int = 0, limit: Annotated[int, Query(le=50)] = 10) -> None:
        self.skip = skip
        self.limit = limit


class AtLeast:
    """A dependency with parameters of its own."""

    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, number: int) -> int:
        if number < self.least:
            raise HTTPException(400, f"less than {self.least}", {"X-Least": str(self.least)})
        return number


def query(q: str | None = None) -> str | None:
    return q


def query_or_header(q: Annotated[str | None, Depends(query)], x_last: Annotated[str, Header()] = "none") -> str:
    return q or x_last


def setting() -> str:
    return "production"


def overridden() -> str:
    return "test"


def factory(name: str) -> Callable[[], str]:
    return lambda: name


@app.get("/nested")
def nested(value: Annotated[str, Depends(query_or_header)]) -> str:
    return value


@app.get("/paging")
def paging(page: Annotated[Paging, Depends()]) -> list[int]:
    return [page.skip, page.limit]


@app.get("/at-least")
def at_least(number: Annotated[int, Depends(AtLeast(5))]) -> int:
    return number


@app.get("/cached", dependencies=[Depends(count_calls), Depends(count_calls), Depends(count_calls, use_cache=False)])
def cached(request: Request) -> int:
    return int(request.state.calls)


@app.get("/setting")
def get_setting(value: Annotated[str, Depends(setting)], made: Annotated[str, Depends(factory("made"))]) -> list[str]:
    return [value, made]


def refuse(x_token: Annotated[str, Header()]) -> None:
    if x_token != "secret":
        raise HTTPException(403, "no")


guarded = APIRouter(prefix="/guarded", dependencies=[Depends(refuse)])


@guarded.get("/")
def inside() -> str:
    return "inside"


app.include_router(guarded)
app.dependency_overrides[setting] = overridden


@serve.ingress(app)
class Served: ...


CASES = [
    Case("nested", "GET", "/nested?q=x"),
    Case("nested, by header", "GET", "/nested", {"X-Last": "y"}),
    Case("a class", "GET", "/paging?skip=3"),
    Case("a class, not valid", "GET", "/paging?limit=51"),
    Case("an instance", "GET", "/at-least?number=5"),
    Case("an instance that refuses", "GET", "/at-least?number=4"),
    Case("cached", "GET", "/cached"),
    Case("overridden", "GET", "/setting"),
    Case("of a router", "GET", "/guarded/", {"X-Token": "secret"}),
    Case("of a router, refused", "GET", "/guarded/", {"X-Token": "guess"}),
    Case("of a router, missing", "GET", "/guarded/"),
]
