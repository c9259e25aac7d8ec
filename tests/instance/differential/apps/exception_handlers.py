"""Exception handlers, and exceptions that nobody handles."""

from fastapi import FastAPI, HTTPException, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from qserve import serve
from tests.instance.differential.case import Case


class OutOfStockError(Exception):
    def __init__(self, name: str) -> None:
        self.name = name


class StillOutOfStockError(OutOfStockError): ...


async def server_error(request: Request, exc: Exception) -> JSONResponse:
    return JSONResponse({"error": type(exc).__name__, "path": request.url.path}, 500)


app = FastAPI(exception_handlers={500: server_error})


@app.exception_handler(OutOfStockError)
async def out_of_stock(request: Request, exc: OutOfStockError) -> JSONResponse:
    return JSONResponse({"message": f"{exc.name} is out of stock"}, 418, {"Retry-After": "120"})


@app.exception_handler(404)
def not_found(request: Request, exc: Exception) -> HTMLResponse:
    return HTMLResponse(f"<h1>No {request.url.path}</h1>", 404)


@app.exception_handler(StarletteHTTPException)
async def reuse(request: Request, exc: StarletteHTTPException) -> Response:
    response = await http_exception_handler(request, exc)
    response.headers["X-Reused"] = "yes"
    return response


@app.get("/stock/{name}")
def stock(name: str) -> None:
    raise (StillOutOfStockError if name == "still" else OutOfStockError)(name)


@app.get("/http/{code}")
def http(code: int) -> None:
    raise HTTPException(code, {"any": ["thing", code]}, {"X-Code": str(code)})


@app.get("/bare/{code}")
async def bare(code: int) -> None:
    raise StarletteHTTPException(code)


@app.get("/bug")
async def bug() -> None:
    raise LookupError("a bug")


@app.get("/group")
async def group() -> None:
    raise ExceptionGroup("two", [ValueError("a"), KeyError("b")])


@app.get("/not-serializable")
def not_serializable() -> object:
    return JSONResponse(object())


@serve.ingress(app)
class Served: ...


CASES = [
    Case("own exception", "GET", "/stock/tea"),
    Case("its subclass", "GET", "/stock/still"),
    Case("HTTPException with detail and headers", "GET", "/http/402"),
    Case("HTTPException without detail", "GET", "/bare/409"),
    Case("an empty 304", "GET", "/bare/304"),
    Case("404 by code", "GET", "/bare/404"),
    Case("404 by routing", "GET", "/nowhere"),
    Case("405", "DELETE", "/bug"),
    Case("a bug", "GET", "/bug"),
    Case("a group of bugs", "GET", "/group"),
    Case("an answer that is no JSON", "GET", "/not-serializable"),
]
