"""A Starlette Router, which is an ASGI application too."""

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, Router

from qserve import serve
from tests.instance.differential.case import Case


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"hello {request.path_params.get('name', 'all')}")


app = Router([Route("/", hello), Route("/{name}", hello), Mount("/in", routes=[Route("/{name}", hello)])])


@serve.ingress(app)
class Served: ...


CASES = [
    Case("the root", "GET", "/"),
    Case("a route", "GET", "/ada"),
    Case("a mount", "GET", "/in/bob"),
    Case("a slash too many", "GET", "/ada/"),
    Case("not found", "GET", "/a/b/c"),
    Case("not allowed", "POST", "/ada"),
]
