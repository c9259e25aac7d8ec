"""Applications mounted in applications, with docs and middleware of their own."""

from fastapi import FastAPI, Request
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request as StarletteRequest
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()
inner = FastAPI(title="Inner")
innermost = FastAPI(title="Innermost", docs_url="/help")


async def where(request: StarletteRequest) -> JSONResponse:
    names = ("path", "root_path", "app_root_path")
    return JSONResponse(
        {
            **{name: request.scope.get(name) for name in names},
            "url": str(request.url),
            "base": str(request.base_url),
        }
    )


starlette = Starlette(
    routes=[Route("/where", where, name="where"), Mount("/deep", routes=[Route("/where", where)])],
    middleware=[Middleware(GZipMiddleware, minimum_size=1)],
)


@app.get("/main")
def main(request: Request) -> list[str]:
    return [str(request.url_for("inner", path="/sub")), str(request.app.url_path_for("starlette:where"))]


@inner.get("/sub", name="sub")
def sub(request: Request) -> list[str]:
    return [request.scope["root_path"], str(request.url_for("sub")), request.app.title]


@innermost.get("/")
def deepest(request: Request) -> str:
    return str(request.scope["root_path"])


inner.mount("/innermost", innermost)
app.mount("/inner", inner, name="inner")
app.mount("/starlette", starlette, name="starlette")
app.mount("/params/{name}", starlette)


@serve.ingress(app)
class Served: ...


CASES = [
    Case("the main application", "GET", "/main"),
    Case("a mounted one", "GET", "/inner/sub"),
    Case("one mounted in that", "GET", "/inner/innermost/"),
    Case("without a slash at the end", "GET", "/inner/innermost"),
    Case("docs of the main application", "GET", "/docs"),
    Case("openapi of the main application", "GET", "/openapi.json"),
    Case("docs of a mounted one", "GET", "/inner/docs"),
    Case("openapi of a mounted one", "GET", "/inner/openapi.json"),
    Case("docs of the innermost", "GET", "/inner/innermost/help"),
    Case("openapi of the innermost", "GET", "/inner/innermost/openapi.json"),
    Case("Starlette", "GET", "/starlette/where"),
    Case("Starlette, mounted routes", "GET", "/starlette/deep/where"),
    Case("a mount with a parameter", "GET", "/params/x/where"),
    Case("404 of a mounted one", "GET", "/inner/nowhere"),
    Case("404 of Starlette", "GET", "/starlette/nowhere"),
]
