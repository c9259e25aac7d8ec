"""The old startup hooks, of applications and of routers."""

from fastapi import APIRouter, FastAPI, Request
from starlette.concurrency import run_in_threadpool

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()
router = APIRouter()
order: list[str] = []


def first() -> None:
    order.append("sync")
    app.state.model = "loaded"


async def second() -> None:
    order.append("async")
    await run_in_threadpool(order.append, "thread")


async def of_router() -> None:
    order.append("router")


app.router.on_startup += [first, second]
router.on_startup.append(of_router)


@router.get("/order")
def get_order() -> list[str]:
    return order


@app.get("/model")
def model(request: Request) -> str:
    return str(request.app.state.model)


app.include_router(router)


@serve.ingress(app)
class Served: ...


CASES = [
    Case("run once, in order", "GET", "/order"),
    Case("and leave state", "GET", "/model"),
]
