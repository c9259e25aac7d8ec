"""Starlette without FastAPI: routes, endpoint classes, mounts, convertors, handlers."""

from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser, requires
from starlette.endpoints import HTTPEndpoint
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Host, Mount, Route, Router

from qserve import serve
from tests.instance.differential.case import Body, Case


class ByHeader(AuthenticationBackend):
    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
        name = conn.headers.get("x-user")
        if name == "bad":
            raise AuthenticationError("bad user")
        return (AuthCredentials(["known"]), SimpleUser(name)) if name else None


class Things(HTTPEndpoint):
    async def get(self, request: Request) -> Response:
        return PlainTextResponse(f"thing {request.path_params['number'] + 1}")

    async def delete(self, request: Request) -> Response:
        return Response(status_code=204)


def sync(request: Request) -> JSONResponse:
    return JSONResponse({"params": request.path_params, "query": dict(request.query_params)})


async def echo(request: Request) -> Response:
    return Response(await request.body(), media_type=request.headers.get("content-type"))


@requires("known")
async def private(request: Request) -> PlainTextResponse:
    return PlainTextResponse(request.user.display_name)


@requires("known", redirect="index")
async def redirected(request: Request) -> PlainTextResponse:
    return PlainTextResponse(request.user.display_name)


async def index(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"{request.url_for('inner:deep', name='x')} {request.app.url_path_for('index')}")


async def host(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"at {request.path_params['sub']}")


async def bug(request: Request) -> Response:
    raise ValueError("a bug")


async def handle(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    return JSONResponse({"detail": exc.detail}, exc.status_code)


app = Starlette(
    routes=[
        Host("{sub}.hosts.example", Router([Route("/host", host)])),
        Route("/", index, name="index"),
        Route("/things/{number:int}", Things),
        Route("/sync/{id:uuid}/{rest:path}", sync),
        Route("/echo", echo, methods=["POST", "PUT"]),
        Route("/private", private),
        Route("/redirected", redirected),
        Route("/bug", bug),
        Mount("/inner", name="inner", routes=[Route("/{name}", sync, name="deep")]),
    ],
    middleware=[Middleware(AuthenticationMiddleware, backend=ByHeader())],
    exception_handlers={404: handle},
)


@serve.ingress(app)
class Served: ...


CASES = [
    Case("index", "GET", "/"),
    Case("an endpoint class", "GET", "/things/2"),
    Case("an endpoint class, DELETE", "DELETE", "/things/2"),
    Case("an endpoint class, not allowed", "POST", "/things/2"),
    Case("an endpoint class, HEAD", "HEAD", "/things/2"),
    Case("convertors", "GET", "/sync/6f1f1f5e-7d0c-4f0f-8c8e-2f9b6f8f2a11/a/b?c=d"),
    Case("echo", "POST", "/echo", body=Body(b"\x00\xff", "image/png")),
    Case("echo of nothing", "PUT", "/echo"),
    Case("known user", "GET", "/private", {"X-User": "ada"}),
    Case("unknown user", "GET", "/private"),
    Case("bad user", "GET", "/private", {"X-User": "bad"}),
    Case("unknown user is redirected", "GET", "/redirected"),
    Case("a mount", "GET", "/inner/y"),
    Case("a host", "GET", "/host", host="www.hosts.example"),
    Case("another host", "GET", "/host", host="hosts.example"),
    Case("a bug", "GET", "/bug"),
    Case("404", "GET", "/nowhere"),
]
