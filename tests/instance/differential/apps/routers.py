"""Routers with prefixes, tags and routers inside them."""

from fastapi import APIRouter, FastAPI, Request

from qserve import serve
from tests.instance.differential.case import Case

items = APIRouter(prefix="/items", tags=["items"], responses={404: {"description": "Not found"}})
users = APIRouter()
admin = APIRouter(prefix="/admin")


@items.get("/")
def list_items() -> list[str]:
    return ["a"]


@items.get("/{name}", name="item")
def item(name: str, request: Request) -> str:
    return str(request.url_for("item", name=name))


@users.get("")
def list_users() -> list[str]:
    return ["ada"]


@users.post("/{name}", deprecated=True)
def add(name: str) -> str:
    return name


@admin.get("/status")
def status() -> str:
    return "fine"


admin.include_router(items, prefix="/stock")
app = FastAPI()
app.include_router(items)
app.include_router(users, prefix="/users", tags=["people"])
app.include_router(admin)
app.include_router(users, prefix="/v2/users", include_in_schema=False)


@serve.ingress(app)
class Served: ...


CASES = [
    Case("a router", "GET", "/items/"),
    Case("a route's URL", "GET", "/items/x"),
    Case("a prefix when included", "GET", "/users"),
    Case("a prefix when included, POST", "POST", "/users/x"),
    Case("a router in a router", "GET", "/admin/stock/y"),
    Case("beside it", "GET", "/admin/status"),
    Case("a router included twice", "GET", "/v2/users"),
    Case("no such route of a router", "PUT", "/items/"),
    Case("described", "GET", "/openapi.json"),
]
