"""FastAPI, APIRouter, Starlette and other ASGI applications in front of a class."""

import asyncio
import functools
import logging
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from types import MethodType
from typing import Annotated, Any

import pytest
from fastapi import (
    APIRouter,
    Depends,
    FastAPI,
    HTTPException,
    Query,
    Request,
    Response,
)
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, Router
from starlette.staticfiles import StaticFiles

from qserve.deployments.deployment import deployment
from qserve.deployments.ingress import FrozenApp, ingress
from qserve.deployments.pickled_code import dumps, loads
from qserve.errors import StreamBroken
from qserve_workers.user import last_words
from tests.support.local_code import running
from tests.support.slowness import patience

# What can be an ingress


def test_only_classes_can_have_an_application() -> None:
    app = FastAPI()
    with pytest.raises(ValueError, match=r"@serve\.ingress must be used with a class\."):
        ingress(app)(lambda: None)  # type: ignore[type-var]


def test_the_class_may_not_have_call() -> None:
    app = FastAPI()
    with pytest.raises(ValueError, match=r"Class passed to @serve\.ingress may not have __call__ method\."):

        @ingress(app)
        class Callable_:  # noqa: N801
            def __call__(self) -> None: ...


async def test_an_existing_fastapi_app_is_served_as_it_is() -> None:
    app = FastAPI()

    @app.get("/{a}")
    def func(a: int) -> dict[str, int]:
        return {"result": a}

    class Existing:
        pass

    async with running(ingress(app)(Existing)) as replica:
        assert (await replica.get("/100")).json() == {"result": 100}
        invalid = await replica.get("/not-number")
        assert invalid.status == 422
        assert invalid.json()["detail"][0]["type"] == "int_parsing"
        assert (await replica.get("/a/b")).status == 404


async def test_a_router_can_be_the_application() -> None:
    router = APIRouter(prefix="/v1")

    @router.get("/plain")
    def plain() -> str:
        return "plain"

    @ingress(router)
    class Routed:
        def __init__(self) -> None:
            self.word = "mine"

        @router.get("/own")
        def own(self) -> str:
            return self.word

    async with running(Routed) as replica:
        assert (await replica.get("/v1/plain")).json() == "plain"
        assert (await replica.get("/v1/own")).json() == "mine"


@pytest.mark.parametrize("kind", ["starlette", "router", "callable"])
async def test_any_asgi_application_is_served(kind: str) -> None:
    async def hello(request: Any) -> PlainTextResponse:
        return PlainTextResponse(f"hello {request.query_params['name']}")

    async def plain_callable(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await PlainTextResponse("hello " + scope["query_string"].decode()[5:])(scope, receive, send)

    routes = [Route("/hello", hello)]
    apps: dict[str, Any] = {"starlette": Starlette(routes=routes), "router": Router(routes), "callable": plain_callable}

    class Empty:
        pass

    async with running(ingress(apps[kind])(Empty)) as replica:
        answer = await replica.get("/hello?name=Ada")
        assert (answer.status, answer.text) == (200, "hello Ada")


# Methods of the class


async def test_an_application_of_asgi_2_is_served() -> None:
    class Application:
        def __init__(self, scope: Any) -> None:
            self.scope = scope

        async def __call__(self, receive: Any, send: Any) -> None:
            await PlainTextResponse(self.scope["path"])(self.scope, receive, send)

    @ingress(Application)
    class Views:
        pass

    async with running(Views) as replica:
        assert (await replica.get("/x")).text.endswith("/x")


async def test_a_function_builds_the_application_in_the_replica() -> None:
    built = list[FastAPI]()

    def make() -> FastAPI:
        app = FastAPI()
        app.state.lock = threading.Lock()  # nothing that could travel
        built.append(app)

        @app.get("/hello")
        def hello() -> str:
            return "hello"

        return app

    @deployment
    @ingress(make)
    class Views:
        pass

    assert built == []
    async with running(Views) as here:
        assert (await here.get("/hello")).json() == "hello"
        assert len(built) == 1


async def test_a_function_that_builds_no_application_fails_the_construction() -> None:
    @deployment
    @ingress(lambda: None)
    class Views:
        pass

    with pytest.raises(TypeError, match=r"with which @serve\.ingress was called, returned no ASGI application"):
        async with running(Views):
            pass


def test_an_application_of_wsgi_is_refused_and_the_error_says_what_to_do() -> None:
    def application(environ: Any, start_response: Any) -> Any: ...

    with pytest.raises(TypeError, match=r"two arguments, as WSGI applications do\. Wrap it: a2wsgi"):
        ingress(application)


async def test_methods_get_the_instance_and_the_apps_own_routes_are_there_too() -> None:
    app = FastAPI()

    @app.get("/other")
    def other() -> str:
        return "other"

    @ingress(app)
    class Views:
        def __init__(self) -> None:
            self.val = 1

        @app.get("/calc/{i}")
        def b(self, i: int) -> int:
            return i + self.val

        @app.post("/calc/{i}")
        async def c(self, i: int) -> int:
            return i - self.val

        def undecorated(self, i: int) -> int:
            return i * 100

    async with running(Views, name="Views") as replica:
        assert (await replica.get("/calc/41")).json() == 42
        assert (await replica.request("POST", "/calc/41")).json() == 40
        assert (await replica.get("/other")).json() == "other"
        assert await replica.call("b", 41) == 42
        assert await replica.call("undecorated", 2) == 200


async def test_openapi_does_not_list_self() -> None:
    app = FastAPI()

    @ingress(app)
    class Views:
        @app.get("/x/{i}")
        def x(self, i: int, untyped=3) -> int:  # type: ignore[no-untyped-def]
            return i

    async with running(Views, name="Views") as replica:
        operation = (await replica.get("/openapi.json")).json()["paths"]["/x/{i}"]["get"]
        assert [parameter["name"] for parameter in operation["parameters"]] == ["i", "untyped"]
        assert (await replica.get("/x/5")).json() == 5


async def test_two_methods_of_one_name_with_different_routes_both_work() -> None:
    app = FastAPI()

    @ingress(app)
    class Twice:
        @app.get("/")
        def method(self) -> str:
            return "hi get"

        @app.post("/")  # type: ignore[no-redef]
        def method(self) -> str:  # noqa: F811
            return "hi post"

    async with running(Twice) as replica:
        assert (await replica.get("/")).json() == "hi get"
        assert (await replica.request("POST", "/")).json() == "hi post"


async def test_static_and_class_methods_can_be_routes() -> None:
    app = FastAPI()

    @ingress(app)
    class Views:
        word = "class word"

        @staticmethod
        @app.get("/static")
        def static(q: int) -> int:
            return q

        @classmethod
        @app.get("/class")
        def klass(cls) -> str:
            return cls.word

    async with running(Views) as replica:
        assert (await replica.get("/static?q=4")).json() == 4
        assert (await replica.get("/class")).json() == "class word"


async def test_inherited_methods_are_served_by_every_subclass() -> None:
    app = FastAPI()

    class Base:
        name = "base"

        @app.get("/name")
        def tell(self) -> str:
            return self.name

    @ingress(app)
    class First(Base):
        name = "first"

    @ingress(app)
    class Second(Base):
        name = "second"

    @ingress(app)
    class Unrelated:
        pass

    async with running(First) as first, running(Second) as second, running(Unrelated) as unrelated:
        assert (await first.get("/name")).json() == "first"
        assert (await second.get("/name")).json() == "second"
        assert (await unrelated.get("/name")).status == 404


async def test_a_method_that_is_overridden_answers_in_the_place_of_the_one_with_the_route() -> None:
    app = FastAPI()

    class Base:
        @app.get("/plain")
        def plain(self) -> str:
            return "base"

        @app.get("/class")
        @app.get("/parameter")
        def other_parameters(self) -> str:
            return "base"

        @app.get("/again")
        @app.get("/once")
        def decorated_again(self) -> str:
            return "base"

        @app.get("/hidden")
        def hidden(self) -> str:
            return "base"

    @ingress(app)
    class Child(Base):
        hidden = None  # type: ignore[assignment]

        async def plain(self) -> str:  # type: ignore[override]
            return f"child of {super().plain()}"

        @classmethod
        def other_parameters(cls, word: str = "none") -> str:
            return f"{cls.__name__} {word}"

        @app.get("/again")
        def decorated_again(self) -> list[str]:  # type: ignore[override]
            return ["child"]

    @ingress(app)
    class Unchanged(Base):
        pass

    async with running(Child) as replica:
        assert (await replica.get("/plain")).json() == "child of base"
        assert (await replica.get("/class?word=a")).json() == "Child a"
        assert (await replica.get("/parameter?word=b")).json() == "Child b"
        assert (await replica.get("/again")).json() == ["child"]
        assert (await replica.get("/hidden")).json() == "base"
    async with running(Unchanged) as replica:
        assert [(await replica.get(path)).json() for path in ("/plain", "/again", "/once")] == ["base"] * 3


async def test_a_route_that_a_subclass_decorates_again_is_not_told_to_be_late(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()

    class Base:
        @app.get("/again")
        def again(self) -> str:
            return "base"

    @ingress(app)
    class Child(Base):
        @app.get("/again")
        def again(self) -> str:
            return "child"

    async with running(Child) as replica:
        assert (await replica.get("/again")).json() == "child"
    assert not caplog.records


class _Decorated:
    """What a decorator that is a class makes of a method."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function

    def __get__(self, instance: object, owner: type) -> Callable[..., Any]:
        return functools.partial(self._function, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


@pytest.mark.parametrize("is_pickled", [False, True])
@pytest.mark.parametrize("decorate", [functools.cache, _Decorated])
async def test_what_a_decorator_makes_of_a_method_gets_the_instance(decorate: Any, is_pickled: bool) -> None:
    app = FastAPI()

    @ingress(app)
    class Squares:
        def __init__(self) -> None:
            self.word = "square"

        @app.get("/squares/{number}")
        @decorate  # type: ignore[untyped-decorator]
        def square(self, number: int) -> str:
            return f"{self.word} {number * number}"

    code: Any = loads(dumps(Squares)) if is_pickled else Squares
    async with running(code) as replica:
        assert (await replica.get("/squares/3")).json() == "square 9"


async def test_a_subclass_of_an_ingress_class_serves_its_application() -> None:
    app = FastAPI()

    @ingress(app)
    class Base:
        def word(self) -> str:
            return "base"

        @app.get("/word")
        def tell(self) -> str:
            return self.word()

    class Child(Base):
        def word(self) -> str:
            return "child"

    async with running(Child) as replica:
        assert (await replica.get("/word")).json() == "child"


# One app, several classes


async def test_each_class_serves_only_its_own_methods() -> None:
    app = FastAPI()

    @app.get("/app-level")
    def app_level() -> str:
        return "both"

    @ingress(app)
    class A:
        @app.get("/a")
        def a(self) -> str:
            return "a"

    @ingress(app)
    class AB:  # its name contains the other's
        @app.get("/ab")
        def ab(self) -> str:
            return "ab"

    async with running(A) as first, running(AB) as second:
        assert [(await first.get(path)).status for path in ("/app-level", "/a", "/ab")] == [200, 200, 404]
        assert [(await second.get(path)).status for path in ("/app-level", "/a", "/ab")] == [200, 404, 200]
        assert set((await second.get("/openapi.json")).json()["paths"]) == {"/app-level", "/ab"}


async def test_classes_may_be_decorated_after_both_are_defined() -> None:
    app = FastAPI()

    class A:
        @app.get("/a")
        def a(self) -> str:
            return "a"

    class B:
        @app.get("/b")
        def b(self) -> str:
            return "b"

    async with running(ingress(app)(A)) as first, running(ingress(app)(B)) as second:
        assert [(await first.get(path)).status for path in ("/a", "/b")] == [200, 404]
        assert [(await second.get(path)).status for path in ("/a", "/b")] == [404, 200]


async def test_routes_added_after_the_decoration_are_not_served() -> None:
    app = FastAPI()
    router = APIRouter()
    app.include_router(router, prefix="/included")

    @ingress(app)
    class Frozen:
        @app.get("/early")
        def early(self) -> str:
            return "early"

    @app.get("/ignored")
    def ignored() -> None: ...

    @router.get("/ignored")
    def included() -> None: ...

    async with running(Frozen) as replica:
        assert (await replica.get("/early")).status == 200
        assert (await replica.get("/ignored")).status == 404
        assert (await replica.get("/included/ignored")).status == 404


@pytest.mark.parametrize("prefix", [None, "/", "/subpath"])
async def test_a_class_defined_again_replaces_its_routes_and_its_documentation(prefix: str | None) -> None:
    app = FastAPI()
    options: dict[str, Any] = {} if prefix is None else {"route_prefix": prefix}

    @ingress(app)
    class App:
        @app.get("/")
        def func1(self, arg: str) -> str:
            return "hello"

    async with running(App, **options) as replica:
        assert list((await replica.get("/openapi.json")).json()["paths"]["/"]) == ["get"]

    @ingress(app)
    class App:  # type: ignore[no-redef]
        @app.get("/")
        def func1(self, arg: str) -> str:
            return "hello again"

        @app.post("/hello")
        def func2(self, arg: str) -> str:
            return "hello"

    async with running(App, **options) as replica:
        schema = (await replica.get("/openapi.json")).json()
        assert {path: list(operations) for path, operations in schema["paths"].items()} == {
            "/": ["get"],
            "/hello": ["post"],
        }
        assert (await replica.get("/?arg=1")).json() == "hello again"
        docs = await replica.get("/docs")
        root = {None: "/App", "/": "", "/subpath": "/subpath"}[prefix]
        assert f"url: '{root}/openapi.json'" in docs.text


async def test_class_methods_on_an_included_router() -> None:
    app = FastAPI()
    inner = APIRouter(prefix="/inner")
    outer = APIRouter(prefix="/outer")

    @ingress(app)
    class Empty:
        pass

    outer.include_router(inner)
    app.include_router(outer, prefix="/v1")

    @ingress(app)
    class Views:
        def __init__(self) -> None:
            self.word = "found"

        @inner.get("/word")
        def word_(self) -> str:
            return self.word

    async with running(Views) as replica, running(Empty) as other:
        assert (await replica.get("/v1/outer/inner/word")).json() == "found"
        parameters = (await replica.get("/openapi.json")).json()["paths"]["/v1/outer/inner/word"]["get"]
        assert "parameters" not in parameters
        assert (await other.get("/v1/outer/inner/word")).status == 404


class Stamped:
    """A middleware that leaves a header."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def stamp(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-stamp", b"yes")]
            await send(message)

        await self.app(scope, receive, stamp)


async def test_the_middleware_of_a_mounted_router_stays_around_the_methods_of_each_class() -> None:
    class Stamping(APIRouter):
        """Has it for all of its routes."""

        def __init__(self) -> None:
            super().__init__()
            self.middleware_stack = Stamped(self.app)

    app, inside = FastAPI(), Stamping()
    app.mount("/inside", inside)

    @ingress(app)
    class First:
        @inside.get("/first")
        def first(self) -> str:
            return type(self).__name__

    @ingress(app)
    class Second:
        @inside.get("/second")
        def second(self) -> str:
            return type(self).__name__

    async with running(First) as one, running(Second) as two:
        for replica, name, other in ((one, "First", "second"), (two, "Second", "first")):
            answer = await replica.get(f"/inside/{name.lower()}")
            assert (answer.json(), answer.header("x-stamp")) == (name, "yes")
            assert (await replica.get(f"/inside/{other}")).status == 404


@pytest.mark.parametrize("prefix", ["/", "/a", "/api/v1"])
async def test_mounted_applications_redirects_and_urls_work_below_a_prefix(prefix: str) -> None:
    app = FastAPI()
    sub = FastAPI()

    @sub.get("/hi")
    def hi(request: Request) -> dict[str, str]:
        return {"root_path": request.scope["root_path"], "url": str(request.url_for("hi"))}

    @app.get("/a")
    def a(request: Request) -> str:
        return str(request.scope["root_path"])

    @app.get("/redirect")
    def redirect(request: Request) -> RedirectResponse:
        return RedirectResponse(url=request.scope["root_path"] + "/a")

    @app.get("/slash/")
    def slash() -> str:
        return "slash"

    app.mount("/mounted", sub)

    @ingress(app)
    class Views:
        @sub.get("/own")
        def own(self) -> str:
            return type(self).__name__

    root = prefix.rstrip("/")
    async with running(Views, route_prefix=prefix) as replica:
        assert (await replica.get("/a")).json() == root
        assert (await replica.get("/mounted/hi")).json() == {
            "root_path": root + "/mounted",
            "url": f"http://test{root}/mounted/hi",
        }
        assert (await replica.get("/mounted/own")).json() == "Views"
        assert (await replica.get("/redirect")).header("location") == root + "/a"
        assert (await replica.get("/slash")).header("location") == f"http://test{root}/slash/"


async def test_what_the_constructor_adds_is_served(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    included = APIRouter()
    late = APIRouter()

    @included.get("/included")
    def in_router() -> str:
        return "included"

    app.include_router(included, prefix="/r")

    @ingress(app)
    class Views:
        def __init__(self, word: str) -> None:
            self.word = word
            app.add_api_route("/said", self.said)
            app.add_api_route("/thread", self.thread)
            app.include_router(late, prefix="/late")
            app.mount("/sub", Starlette(routes=[Route("/x", lambda _: PlainTextResponse(word))]))
            app.add_middleware(CORSMiddleware, allow_origins=["*"])
            app.add_exception_handler(KeyError, lambda _, __: PlainTextResponse("no such key", 404))
            self.constructed_on = threading.get_ident()

            @late.get("/missing")
            def missing() -> None:
                raise KeyError

        async def said(self, times: int = 1) -> str:
            return self.word * times

        def thread(self) -> bool:
            return threading.get_ident() == self.constructed_on

        @app.get("/own")
        def own(self) -> str:
            return self.word

    @app.get("/after")
    def after() -> None: ...

    async with running(deployment(Views).options(init_args=("a",))) as replica:
        assert (await replica.get("/said?times=2")).json() == "aa"
        assert (await replica.get("/thread")).json() is True
        assert (await replica.get("/late/missing")).text == "no such key"
        assert (await replica.get("/sub/x")).text == "a"
        assert (await replica.get("/own")).json() == "a"
        assert (await replica.get("/r/included", headers={"origin": "x"})).header("access-control-allow-origin") == "*"
        assert (await replica.get("/after")).status == 404
        paths = (await replica.get("/openapi.json")).json()["paths"]
        assert sorted(paths) == ["/late/missing", "/own", "/r/included", "/said", "/thread"]
    assert "are not used" not in caplog.text


def instrument(app: Starlette) -> None:
    """Do as OpenTelemetry: what builds the middlewares of the application from now on knows that application alone."""
    original = app.build_middleware_stack

    def build_middleware_stack(_self: Starlette) -> Any:
        inner = original()

        async def noting(scope: Any, receive: Any, send: Any) -> None:
            scope.setdefault("state", {})["noted"] = "noted"
            await inner(scope, receive, send)

        return noting

    app.build_middleware_stack = MethodType(build_middleware_stack, app)  # type: ignore[method-assign]


@pytest.mark.parametrize("where", ["before", "inside", "constructor", "late"])
async def test_an_application_that_is_instrumented_serves_the_methods_of_a_class(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = FastAPI()
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    if where == "before":
        instrument(app)

    @ingress(app)
    class Views:
        def __init__(self, word: str) -> None:
            self.word = word
            if where == "constructor":
                instrument(app)

        @app.get("/own")
        async def own(self, request: Request) -> list[str]:
            return [self.word, getattr(request.state, "noted", "unnoted")]

        if where == "inside":
            instrument(app)

    if where == "late":
        instrument(app)
    noted = "unnoted" if where == "late" else "noted"
    async with running(deployment(Views).options(init_args=("a",))) as replica:
        response = await replica.get("/own", headers={"origin": "x"})
        assert response.json() == ["a", noted]
        assert response.header("access-control-allow-origin") == "*"
    assert ("Instrumentations were added to the application after" in caplog.text) == (where == "late")
    assert [route.path for route in app.routes if isinstance(route, Route)][-1] == "/own"


async def test_a_router_as_application_serves_what_the_constructor_adds() -> None:
    router = APIRouter(prefix="/r")

    @ingress(router)
    class Views:
        def __init__(self) -> None:
            router.add_api_route("/added", self.added)

        async def added(self) -> str:
            return "added"

    async with running(Views) as replica:
        assert (await replica.get("/r/added")).json() == "added"


async def test_what_comes_after_the_class_is_not_used_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    ran: list[str] = []

    @ingress(app)
    class Views: ...

    app.router.on_startup.append(lambda: ran.append("late"))
    app.add_middleware(CORSMiddleware)
    async with running(Views):
        assert ran == []
    assert "Startup hooks and middlewares were added to the application after @serve.ingress had" in caplog.text


async def test_routes_after_the_class_may_be_for_another_one(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()

    @ingress(app)
    class Views: ...

    @app.get("/late")
    def late() -> None: ...

    @ingress(app)
    class Others: ...

    async with running(Views), running(Others) as others:
        assert (await others.get("/late")).status == 200
        assert caplog.text == ""


@pytest.mark.parametrize("adds", [False, True])
async def test_routes_that_no_class_serves_are_named(caplog: pytest.LogCaptureFixture, adds: bool) -> None:
    app, router, early = FastAPI(), APIRouter(), APIRouter()
    app.include_router(early)

    @ingress(app)
    class Views:
        def __init__(self) -> None:
            if adds:
                app.add_api_route("/added", self.word)

        @app.get("/word")
        def word(self) -> str:
            return "word"

        @router.get("/method")
        def method(self) -> None: ...

    @app.get("/late")
    def late() -> None: ...

    app.include_router(router)
    app.mount("/mounted", StaticFiles(directory="/", html=False))

    async with running(Views) as replica:
        assert (await replica.get("/word")).json() == "word"
        assert (await replica.get("/late")).status == 404
    said = "Views and are not served, requests get 404: /late, /method, /mounted. Add them above"
    assert said in caplog.text
    caplog.clear()
    async with running(Views):
        assert said in caplog.text


async def test_routes_of_a_router_that_serves_by_itself_are_named_too(caplog: pytest.LogCaptureFixture) -> None:
    router = APIRouter()

    @ingress(router)
    class Views:
        @router.get("/word")
        def word(self) -> str:
            return "word"

    router.add_api_route("/late", lambda: None)
    async with running(Views) as replica:
        assert (await replica.get("/word")).json() == "word"
    assert "requests get 404: /late. Add" in caplog.text


@pytest.mark.parametrize(("prefix", "root_path"), [("/", "/own"), ("/own", "/own"), ("/other", "/other")])
async def test_the_prefix_wins_over_the_root_path_of_an_application(prefix: str, root_path: str) -> None:
    with pytest.warns(match="`root_path` parameter is deprecated"):
        app = FastAPI(root_path="/own")

    @app.get("/a")
    def a(request: Request) -> str:
        return str(request.scope["root_path"])

    @ingress(app)
    class Views: ...

    async with running(Views, route_prefix=prefix) as replica:
        assert (await replica.get("/a")).json() == root_path
        assert (await replica.get("/openapi.json")).json()["servers"] == [{"url": root_path}]
    assert app.root_path == "/own"


async def test_a_custom_openapi_function_describes_what_is_served() -> None:
    app = FastAPI()

    def custom_openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            app.openapi_schema = get_openapi(title="Custom", version="2", routes=app.routes)
        return app.openapi_schema

    app.openapi = custom_openapi  # type: ignore[method-assign]

    @ingress(app)
    class Views:
        @app.get("/x")
        def x(self, i: int) -> int:
            return i

    async with running(Views) as replica:
        schema = (await replica.get("/openapi.json")).json()
        assert schema["info"]["title"] == "Custom"
        assert [each["name"] for each in schema["paths"]["/x"]["get"]["parameters"]] == ["i"]


async def test_def_methods_run_on_the_threads_of_the_replica() -> None:
    app = FastAPI()
    router = APIRouter()

    @app.get("/no-method")
    def no_method() -> int:
        return threading.get_ident()

    class Views:
        def __init__(self) -> None:
            self.thread = threading.get_ident()
            self.database = sqlite3.connect(":memory:")  # which only its thread may use

        @router.get("/query/{word}")
        def query(self, word: str, request: Request, times: Annotated[int, Query(le=3)] = 1) -> str:
            """Runs a query."""
            return str(self.database.execute("select ?", [word * times]).fetchone()[0])

        @app.get("/parts")
        def parts(self) -> Iterable[int]:
            yield threading.get_ident() == self.thread
            yield self.database.execute("select 7").fetchone()[0]

        @app.get("/thread")
        async def constructed_on(self) -> int:
            return self.thread

    app.include_router(router, prefix="/v1")

    async with running(ingress(app)(Views)) as replica:
        assert (await replica.get("/v1/query/ab?times=2")).json() == "abab"
        assert (await replica.get("/v1/query/ab?times=4")).status == 422
        assert (await replica.get("/no-method")).json() != (await replica.get("/thread")).json()
        operation = (await replica.get("/openapi.json")).json()["paths"]["/v1/query/{word}"]["get"]
        assert operation["description"] == "Runs a query."
        assert [each["name"] for each in operation["parameters"]] == ["word", "times"]


async def test_max_threads_def_methods_run_at_once() -> None:
    app = FastAPI()
    both_here = threading.Barrier(2)
    threads = set()

    @deployment(max_threads=2)
    @ingress(app)
    class Views:
        @app.get("/")
        def meet(self) -> int:
            threads.add(threading.get_ident())
            return both_here.wait(timeout=10)

    async with running(Views) as replica:
        answers = await asyncio.gather(*(replica.get("/") for _ in range(6)))
        assert sorted(answer.json() for answer in answers) == [0, 0, 0, 1, 1, 1]
        assert len(threads) == 2


async def test_streams_several_cookies_and_lengths_arrive() -> None:
    app = FastAPI()

    @app.get("/stream")
    def stream() -> StreamingResponse:
        return StreamingResponse(iter(["1", "2", "3"]), status_code=418, media_type="text/plain")

    @app.get("/cookies")
    def cookies(response: Response) -> str:
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        return "cookies"

    class Empty:
        pass

    async with running(ingress(app)(Empty)) as replica:
        answer = await replica.get("/stream")
        assert (answer.status, answer.text) == (418, "123")
        answer = await replica.get("/cookies")
        assert len([value for name, value in answer.headers if name == "set-cookie"]) == 2
        assert answer.header("content-length") == "9"


async def test_an_endpoint_that_raises_gives_500_and_the_replica_lives(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()

    @app.get("/raise")
    def fail() -> None:
        raise RuntimeError("secret detail")

    @app.get("/half")
    def half() -> StreamingResponse:
        def chunks() -> Iterator[str]:
            yield "first"
            raise RuntimeError("cut")

        return StreamingResponse(chunks())

    @app.get("/exit")
    async def leave() -> None:
        raise SystemExit(3)

    @app.get("/teapot")
    async def teapot() -> None:
        raise HTTPException(418, "short and stout")

    class Empty:
        pass

    with caplog.at_level(logging.ERROR):
        async with running(ingress(app)(Empty)) as replica:
            for path in ("/raise", "/exit"):
                answer = await replica.get(path)
                assert (answer.status, answer.text) == (500, "Internal Server Error")
            with pytest.raises(StreamBroken):  # its beginning is on the way: it can only be cut
                await replica.get("/half")
            assert (await replica.get("/teapot")).status == 418
    assert "secret detail" in caplog.text


# Life cycle


async def test_hooks_run_in_order_around_the_instance() -> None:
    story: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        story.append("startup")
        app.state.made = "by startup"
        yield {"kept": "lifespan state"}
        story.append("shutdown")

    app = FastAPI(lifespan=lifespan)

    @ingress(app)
    class Views:
        def __init__(self) -> None:
            story.append("constructor")

        @app.get("/")
        def states(self, request: Request) -> list[str]:
            return [request.app.state.made, request.state.kept, app.state.made]

        def __del__(self) -> None:
            story.append("destructor")

    assert story == []
    async with running(Views) as replica:
        assert story == ["constructor", "startup"]
        assert (await replica.get("/")).json() == ["by startup", "lifespan state", "by startup"]
    assert story == ["constructor", "startup", "shutdown", "destructor"]


async def test_a_shutdown_hook_that_takes_too_long_is_told_and_the_destructor_runs_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = patience(30)
    monkeypatch.setattr(last_words, "_KEPT_S", kept)
    story: list[str] = []
    may_end = asyncio.Event()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        while not may_end.is_set():
            try:
                await may_end.wait()
            except asyncio.CancelledError:
                story.append("cancelled")

    @ingress(FastAPI(lifespan=lifespan))
    class Views:
        async def __del__(self) -> None:
            story.append("destructor")

    async with running(Views) as replica:
        await replica.code.close(kept + 0.1)
        assert story == ["cancelled", "destructor"]
        (told,) = caplog.messages
        assert told.startswith("Deployment Views: a shutdown hook has not ended within the 0.1 s that were left")
        may_end.set()


async def test_a_destructor_that_takes_too_long_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Slow:
        async def __del__(self) -> None:
            await asyncio.Event().wait()

    async with running(Slow) as replica:
        await replica.code.close(0.1)
        (told,) = caplog.messages
        assert told.startswith("Deployment Slow: __del__ has not ended within the 0.1 s that were left")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_old_style_hooks_run_and_late_ones_do_not() -> None:
    story: list[str] = []
    app = FastAPI()

    @app.on_event("startup")
    def started() -> None:
        story.append("startup")

    @app.on_event("shutdown")
    async def stopped() -> None:
        story.append("shutdown")

    @ingress(app)
    class Views:
        pass

    app.router.add_event_handler("startup", lambda: story.append("too late"))
    async with running(Views):
        assert story == ["startup"]
    assert story == ["startup", "shutdown"]


async def test_a_failing_startup_hook_fails_the_construction() -> None:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        raise ZeroDivisionError("no database")
        yield

    @ingress(FastAPI(lifespan=lifespan))
    class Views:
        pass

    with pytest.raises(ZeroDivisionError, match="no database"):
        async with running(Views):
            pass


# Travelling


async def test_classes_and_apps_of_a_local_scope_travel_as_pickles() -> None:
    app = FastAPI()
    router = APIRouter()
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    app.state.word = "travelled"

    class Unimportable(BaseModel):
        number: int

    def dependency() -> int:
        return 7

    @app.exception_handler(KeyError)
    async def handler(_: Request, exc: KeyError) -> JSONResponse:
        return JSONResponse({"missing": str(exc)}, status_code=404)

    @router.get("/included", response_model=Unimportable)
    def included(n=Depends(dependency)) -> Any:  # type: ignore[no-untyped-def]  # noqa: B008
        return {"number": n}

    app.include_router(router)
    app.mount("/mounted", Starlette(routes=[Route("/x", lambda _: PlainTextResponse("mounted"))]))

    @ingress(app)
    class Views:
        def __init__(self) -> None:
            self.add = 1

        @app.post("/own")
        def own(self, request: Request) -> list[Any]:
            return [self.add, request.app.state.word, app.state.word]

        @app.get("/missing")
        def missing(self) -> None:
            raise KeyError("it")

    async with running(Views) as here:
        assert (await here.get("/included")).json() == {"number": 7}
    async with running(Views, travel=True) as replica:
        assert (await replica.get("/included")).json() == {"number": 7}
        assert (await replica.get("/mounted/x")).text == "mounted"
        assert (await replica.request("POST", "/own")).json() == [1, "travelled", "travelled"]
        assert (await replica.get("/missing")).status == 404
        assert (await replica.get("/docs")).status == 200


def test_the_original_application_is_left_alone() -> None:
    app = Starlette(routes=[Mount("/m", routes=[])])
    before = list(app.routes)

    @deployment
    @ingress(app)
    class Views:
        pass

    assert app.routes == before
    frozen = Views.func_or_class.__qserve_asgi__  # type: ignore[attr-defined]
    assert isinstance(frozen, FrozenApp)
    assert frozen.app is not app
