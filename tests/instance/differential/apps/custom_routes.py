"""Route classes, operation ids, callbacks and webhooks of one's own."""

import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Body, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel

from qserve import serve
from tests.instance.differential import case
from tests.instance.differential.case import Case, as_json

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Timed(APIRoute):
    def get_route_handler(self) -> Handler:
        original = super().get_route_handler()

        async def handler(request: Request) -> Response:
            begun = time.monotonic()
            response = await original(request)
            response.headers["X-Timed"] = str(time.monotonic() - begun < 10)
            return response

        return handler


class Reversing(Request):
    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._body = (await super().body())[::-1]
        return self._body


class Explaining(APIRoute):
    def get_route_handler(self) -> Handler:
        original = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await original(Reversing(request.scope, request.receive))
            except RequestValidationError as exc:
                raise HTTPException(422, {"count": len(exc.errors())}) from exc

        return handler


class Invoice(BaseModel):
    total: float


def operation_id(route: APIRoute) -> str:
    return f"{'-'.join(sorted(route.methods or ()))}-{route.name}"


app = FastAPI(generate_unique_id_function=operation_id)
timed = APIRouter(route_class=Timed)
explaining = APIRouter(route_class=Explaining)
callbacks = APIRouter()


@callbacks.post("{$callback_url}/paid/{$request.body.id}")
def paid(body: Invoice) -> None: ...


@app.webhooks.post("new-invoice")
def new_invoice(body: Invoice) -> None: ...


@timed.get("/timed")
def get_timed() -> str:
    return "timed"


@timed.get("/timed/{code}")
def refused(code: int) -> None:
    raise HTTPException(code)


@explaining.post("/sum")
async def add(numbers: list[int] = Body()) -> int:  # noqa: B008
    return sum(numbers)


@app.post("/invoices", callbacks=callbacks.routes, openapi_extra={"x-own": True}, operation_id="make_invoice")
def invoices(invoice: Invoice, callback_url: str | None = None) -> Invoice:
    return invoice


app.include_router(timed)
app.include_router(explaining)


@serve.ingress(app)
class Served: ...


CASES = [
    Case("a route class", "GET", "/timed"),
    Case("a route class, refused", "GET", "/timed/409"),
    Case("a request class", "POST", "/sum", body=case.Body(b"]03,21[", "application/json")),
    Case("its errors", "POST", "/sum", body=case.Body(b']"x","y"[', "application/json")),
    Case("callbacks are only described", "POST", "/invoices", body=as_json({"total": 1})),
    Case("described", "GET", "/openapi.json"),
]
