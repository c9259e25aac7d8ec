"""`serve.ingress`: applications of FastAPI and others, through the gateway."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Header, Query, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import qserve
from qserve import serve
from tests.support.gates import Notes
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, wait_until

pytestmark = pytest.mark.usefixtures("qserve_instance")


class Inner(BaseModel):
    """A nested model."""

    numbers: list[int]


class Body(BaseModel):
    """A body."""

    name: str
    inner: Inner


def test_routes_of_the_app_and_of_the_class_work_together_and_methods_through_handles(http: httpx.Client) -> None:
    app = FastAPI()

    @app.get("/plain")
    def plain() -> str:
        return "plain"

    @serve.deployment(route_prefix="/view")
    @serve.ingress(app)
    class View:
        def __init__(self) -> None:
            self.number = 1

        @app.get("/calculate/{number}")
        def calculate(self, number: int) -> int:
            return self.number + number

        @app.post("/other")
        async def other(self, number: int) -> int:
            return self.number + number + 1

        def undecorated(self) -> int:
            return self.number

    View.deploy()
    handle: Any = View.get_handle()

    assert http.get("/view/plain").json() == "plain"
    assert http.get("/view/calculate/41").json() == 42
    assert http.post("/view/other?number=1").json() == 3
    assert http.get("/view/calculate/x").status_code == 422
    assert http.get("/view/nothing").status_code == 404
    assert http.get("/view/other").status_code == 405
    assert qserve.get(handle.calculate.remote(41), timeout=patience(LIMIT_S)) == 42
    assert qserve.get(handle.other.remote(number=1), timeout=patience(LIMIT_S)) == 3
    assert qserve.get(handle.undecorated.remote(), timeout=patience(LIMIT_S)) == 1


def test_an_existing_app_is_served_with_an_empty_class(http: httpx.Client) -> None:
    app = FastAPI()

    @app.get("/{name}")
    def hello(name: str) -> str:
        return f"Hello {name}"

    @serve.deployment(route_prefix="/existing")
    @serve.ingress(app)
    class Existing:
        pass

    Existing.deploy()

    assert http.get("/existing/Ada").json() == "Hello Ada"


@pytest.mark.parametrize("kind", ["starlette", "plain ASGI", "router"])
def test_any_asgi_application_is_served(kind: str, http: httpx.Client) -> None:
    def hello(request: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    async def plain(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await PlainTextResponse("hello")(scope, receive, send)

    router = APIRouter()
    router.add_api_route("/hello", hello, response_class=PlainTextResponse)
    app = {"starlette": Starlette(routes=[Route("/hello", hello)]), "plain ASGI": plain, "router": router}[kind]

    @serve.deployment(route_prefix="/asgi")
    @serve.ingress(app)
    class Any_:  # noqa: N801
        pass

    Any_.deploy()

    assert http.get("/asgi/hello").text == "hello"


def test_one_app_serves_two_deployments_each_with_its_own_methods(http: httpx.Client) -> None:
    app = FastAPI()

    @app.get("/common")
    def common() -> str:
        return "common"

    @serve.deployment(route_prefix="/a")
    @serve.ingress(app)
    class A:
        @app.get("/only-a")
        def only(self) -> str:
            return type(self).__name__

        @app.get("/shared")
        def shared(self) -> str:
            return "of a"

    @serve.deployment(route_prefix="/ab")
    @serve.ingress(app)
    class AB:
        @app.get("/only-ab")
        def only(self) -> str:
            return type(self).__name__

        @app.get("/shared")
        def shared(self) -> str:
            return "of ab"

    serve.run([A, AB])

    seen = {
        path: (answer.status_code, answer.json())
        for path in ("/a/common", "/ab/common", "/a/only-a", "/ab/only-ab", "/a/shared", "/ab/shared")
        for answer in [http.get(path)]
    }
    assert seen == {
        "/a/common": (200, "common"),
        "/ab/common": (200, "common"),
        "/a/only-a": (200, "A"),
        "/ab/only-ab": (200, "AB"),
        "/a/shared": (200, "of a"),
        "/ab/shared": (200, "of ab"),
    }
    assert http.get("/a/only-ab").status_code == 404
    assert http.get("/ab/only-a").status_code == 404


@pytest.mark.parametrize("prefix", ["/docs-of", "/", "/deep/path"])
def test_documentation_lists_what_is_served_below_any_prefix_and_follows_a_redeploy(
    prefix: str, http: httpx.Client
) -> None:
    app = FastAPI()
    base = prefix.rstrip("/")

    def documented() -> dict[str, list[str]]:
        paths = http.get(f"{base}/openapi.json").json()["paths"]
        return {path: sorted(operations) for path, operations in paths.items()}

    def parameters(path: str, method: str) -> list[str]:
        operation = http.get(f"{base}/openapi.json").json()["paths"][path][method]
        return [parameter["name"] for parameter in operation.get("parameters", [])]

    @serve.deployment(name="App", route_prefix=prefix)
    @serve.ingress(app)
    class App:
        @app.get("/one")
        def one(self, q: int) -> None: ...

    App.deploy()
    assert documented() == {"/one": ["get"]}
    assert parameters("/one", "get") == ["q"]
    docs = http.get(f"{base}/docs")
    assert docs.status_code == 200
    assert f"{base}/openapi.json" in docs.text

    @serve.deployment(name="App", route_prefix=prefix)
    @serve.ingress(app)
    class App:  # type: ignore[no-redef]
        @app.get("/one")
        def one(self) -> None: ...

        @app.post("/two")
        def two(self) -> None: ...

    App.deploy()
    assert documented() == {"/one": ["get"], "/two": ["post"]}
    assert parameters("/one", "get") == []


def test_routes_added_after_the_decoration_are_not_served_and_redirects_stay_below_the_prefix(
    http: httpx.Client,
) -> None:
    app = FastAPI()

    @serve.deployment(route_prefix="/frozen")
    @serve.ingress(app)
    class Frozen:
        @app.get("/")
        def root(self) -> str:
            return "root"

        @app.get("/{subpath}")
        def get(self, subpath: str) -> str:
            return f"get {subpath}"

        @app.post("/{subpath}")
        def post(self, subpath: str) -> str:
            return f"post {subpath}"

    @app.get("/a/b")
    def ignored() -> str:
        return "ignored"

    Frozen.deploy()

    assert http.get("/frozen", follow_redirects=True).json() == "root"
    assert http.get("/frozen/").json() == "root"
    assert http.get("/frozen/x").json() == "get x"
    assert http.post("/frozen/x").json() == "post x"
    assert http.get("/frozen/a/b").status_code == 404


def test_fastapi_with_all_it_can(http: httpx.Client, notes: Notes) -> None:  # noqa: C901 one application
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.started = "started"
        yield

    app = FastAPI(openapi_url="/my_api.json", lifespan=lifespan)
    app.add_middleware(CORSMiddleware, allow_origins=["*"])

    @app.middleware("http")
    async def add_header(request: Request, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["x-middleware"] = "was here"
        return response

    class Teapot(Exception):
        pass

    @app.exception_handler(Teapot)
    def teapot(request: Request, error: Teapot) -> JSONResponse:
        return JSONResponse({"error": "teapot"}, status_code=418)

    async def counted() -> Any:
        notes.add("before")
        yield 7
        notes.add("after")

    sub = FastAPI()

    @sub.get("/hello")
    def sub_hello(request: Request) -> str:
        return str(request.url_for("sub_hello"))

    router = APIRouter()

    @router.get("/hello")
    def router_hello(request: Request) -> str:
        return str(request.app.state.started)

    app.include_router(router, prefix="/router")
    app.mount("/mounted", sub)

    @serve.deployment(route_prefix="/all")
    @serve.ingress(app)
    class All:
        @app.post("/body", status_code=201, response_model=Inner)
        def body(self, body: Body, q: int = Query(ge=1), x_token: str = Header(), dep: int = Depends(counted)) -> Any:
            return {"numbers": [*body.inner.numbers, q, dep], "extra": x_token}

        @app.get("/raises")
        def raises(self) -> None:
            raise Teapot

        @app.get("/background")
        def background(self, tasks: BackgroundTasks) -> str:
            tasks.add_task(notes.add, "background")
            return "done"

        @app.get("/stream")
        def stream(self) -> StreamingResponse:
            return StreamingResponse(iter("123"), status_code=418, media_type="text/plain")

    All.deploy()

    body = {"name": "n", "inner": {"numbers": [1]}}
    answer = http.post("/all/body?q=2", json=body, headers={"x-token": "t"})
    assert (answer.status_code, answer.json()) == (201, {"numbers": [1, 2, 7]})
    assert notes.read() == ["before", "after"]
    invalid = http.post("/all/body?q=0", json=body, headers={"x-token": "t"})
    assert (invalid.status_code, invalid.json()["detail"][0]["loc"]) == (422, ["query", "q"])
    assert (http.get("/all/raises").status_code, http.get("/all/raises").json()) == (418, {"error": "teapot"})
    assert http.get("/all/background").json() == "done"
    wait_until(lambda: notes.read()[-1] == "background")  # it runs once the response has left
    assert http.get("/all/router/hello").json() == "started"
    assert http.get("/all/mounted/hello").json().endswith("/all/mounted/hello")
    assert http.get("/all/stream").text == "123"
    missing = http.get("/all/missing", headers={"Origin": "https://example.org"})
    assert (missing.status_code, missing.headers["x-middleware"]) == (404, "was here")
    assert missing.headers["access-control-allow-origin"] == "*"
    assert "/body" in http.get("/all/my_api.json").json()["paths"]
    assert http.get("/all/redoc").status_code == 200


def test_startup_hooks_run_after_the_constructor_and_shutdown_hooks_before_the_destructor(
    http: httpx.Client, notes: Notes
) -> None:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        notes.add("startup")
        yield
        notes.add("shutdown")

    app = FastAPI(lifespan=lifespan)

    @serve.deployment
    @serve.ingress(app)
    class Hooks:
        def __init__(self) -> None:
            notes.add("constructor")

        @app.get("/pid")
        def pid(self) -> int:
            return os.getpid()

        def __del__(self) -> None:
            notes.add("destructor")

    Hooks.deploy()
    assert http.get("/Hooks/pid").json() > 0
    assert notes.read() == ["constructor", "startup"]

    Hooks.delete()

    assert notes.read() == ["constructor", "startup", "shutdown", "destructor"]


def test_an_app_of_a_script_with_models_of_its_own_is_served(http: httpx.Client, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from fastapi import FastAPI\n"
        "from pydantic import BaseModel\n"
        "from qserve import serve\n"
        "app = FastAPI()\n"
        "class Nested(BaseModel):\n"
        "    x: list[int]\n"
        "class Answer(BaseModel):\n"
        "    nested: Nested\n"
        "def make():\n"
        "    @serve.deployment(route_prefix='/script')\n"
        "    @serve.ingress(app)\n"
        "    class Script:\n"
        "        @app.get('/', response_model=Answer)\n"
        "        def root(self, numbers=3):\n"
        "            return Answer(nested=Nested(x=list(range(int(numbers)))))\n"
        "    return Script\n"
        "make().deploy()\n"
    )

    subprocess.run([sys.executable, script], check=True, timeout=patience(LIMIT_S), cwd=tmp_path)

    assert http.get("/script/").json() == {"nested": {"x": [0, 1, 2]}}
    assert http.get("/script/?numbers=1").json() == {"nested": {"x": [0]}}


def test_an_endpoint_that_raises_is_500_and_the_replica_goes_on(http: httpx.Client) -> None:
    app = FastAPI()

    @serve.deployment
    @serve.ingress(app)
    class Raises:
        @app.get("/raise")
        def raises(self) -> None:
            raise ValueError("not for clients")

        @app.get("/pid")
        def pid(self) -> int:
            return os.getpid()

    Raises.deploy()
    before = http.get("/Raises/pid").json()

    answer = http.get("/Raises/raise")

    assert (answer.status_code, answer.text) == (500, "Internal Server Error")
    assert http.get("/Raises/pid").json() == before
