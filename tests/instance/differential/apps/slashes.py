"""Slashes at the end, and the redirects to them."""

from fastapi import APIRouter, FastAPI, Request

from qserve import serve
from tests.instance.differential.case import Body, Case

app = FastAPI()
strict = APIRouter(redirect_slashes=False)


@app.get("/")
def root() -> str:
    return "root"


@app.get("/without")
def without() -> str:
    return "without"


@app.post("/with/")
async def with_slash(request: Request) -> str:
    return (await request.body()).decode()


@strict.get("/strict")
def no_redirect() -> str:
    return "strict"


app.include_router(strict)
sub = FastAPI(redirect_slashes=False)


@sub.get("/there/")
def there() -> str:
    return "there"


app.mount("/sub", sub)


@serve.ingress(app)
class Served: ...


CASES = [
    Case("the bare prefix", "GET", ""),
    Case("the bare prefix with a query", "GET", "?x=1"),
    Case("the root", "GET", "/"),
    Case("one too many", "GET", "/without/"),
    Case("one too many, with a query", "GET", "/without/?x=%C3%BC"),
    Case("one missing, POST", "POST", "/with", body=Body(b"text")),
    Case("all right, POST", "POST", "/with/", body=Body(b"text")),
    Case("a router of its own mind", "GET", "/strict/"),
    Case("an application of its own mind", "GET", "/sub/there"),
    Case("only slashes", "GET", "//"),
    Case("a host without a port", "GET", "/without/", host="apps.example"),
]
