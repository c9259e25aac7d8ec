"""`@serve.ingress(app)`: an ASGI application (FastAPI, APIRouter, Starlette or any other) that serves for a class."""

import inspect
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.routing import BaseRoute

from qserve.deployments.app_copy import (
    ChangeRoute,
    copy_app,
    is_documentation,
    is_instrumented,
    rebuild_route,
    walk,
)
from qserve.deployments.loading import Deployable

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=type)

Endpoint = Callable[..., Any]
"""A function, or what behaves like one in the body of a class."""

_OWNER = "__qserve_class__"
_PLACES = "__qserve_places__"
"""Is on the endpoints that some class claims: the paths and HTTP methods of their routes."""
_SERVED = "__qserve_served__"
"""Is on the routes that some class serves."""
_MOST_SHOWN = 5


@dataclass(frozen=True)
class FrozenApp:
    """The application of an ingress class as it was when the class was decorated.

    Attributes:
        app: The application, with what its class serves; None if a function builds it.
        original: What the class was decorated with.
    """

    app: Any
    original: Any


@dataclass(frozen=True)
class Contents:
    """What an application holds at some moment.

    Attributes:
        routes: Its routes, those of included routers and mounted applications too.
        at_the_top: How many of its routes are its own, mounts among them.
        counts: How many hooks, middlewares, exception handlers and instrumentations it has.
    """

    routes: list[BaseRoute]
    at_the_top: int
    counts: dict[str, int]


_COUNTED: dict[str, Callable[[Any], int]] = {
    "startup hooks": lambda app: len(getattr(getattr(app, "router", app), "on_startup", ())),
    "shutdown hooks": lambda app: len(getattr(getattr(app, "router", app), "on_shutdown", ())),
    "middlewares": lambda app: len(getattr(app, "user_middleware", ())),
    "exception handlers": lambda app: len(getattr(app, "exception_handlers", ())),
    "instrumentations": is_instrumented,
}


def ingress(app: Any) -> Callable[[C], C]:
    """Serve the routes of an ASGI application from a deployment. It stands below `@serve.deployment`.

    Methods that are decorated with `get`, `post`, ... of the application are called with `self`, the instance of the
    replica; a method that overrides one in a subclass answers in its place. A class serves the routes of the
    application and those of its own methods, as they are at this moment, and what the constructor of the class adds to
    the application. What is added otherwise later is not served. An empty class serves an existing application as it
    is.

    Args:
        app: FastAPI, APIRouter, Starlette, or any ASGI application; or a function without parameters that builds one,
            in each replica, after the instance has been constructed.

    Raises:
        TypeError: `app` is no ASGI application.
        ValueError: What is decorated is no class, or a class with a `__call__` method.
    """
    if not callable(app):
        raise TypeError(f"@serve.ingress expects an ASGI application, not {app!r}.")
    takes = _parameters_of(app)
    if inspect.isclass(app) and takes == 0:
        raise TypeError(f"@serve.ingress needs the application: @serve.ingress(app) above the class {app.__name__}.")
    if takes == 2:
        raise TypeError(
            f"@serve.ingress expects an ASGI application, and {app!r} takes two arguments, as WSGI applications do. "
            "Wrap it: a2wsgi.WSGIMiddleware(app), or another adapter from WSGI to ASGI."
        )
    if takes == 1:
        app = _Asgi2(app)

    def decorate(cls: C) -> C:
        if not inspect.isclass(cls):
            order = " It stands below @serve.deployment, not above it." if isinstance(cls, Deployable) else ""
            raise ValueError(f"@serve.ingress must be used with a class.{order}")
        if any("__call__" in vars(base) for base in cls.__mro__):
            raise ValueError(
                "Class passed to @serve.ingress may not have __call__ method. The routes of the application answer its "
                f"requests: give {cls.__name__}.__call__ another name and a route, or leave @serve.ingress out."
            )
        frozen = None if takes == 0 else _freeze(app, cls)
        cls.__qserve_asgi__ = FrozenApp(frozen, app)  # type: ignore[attr-defined]
        return cls

    return decorate


def bind_app(
    instance: object,
    before: Contents | None = None,
    on_thread: Callable[[MethodType], Callable[..., Any]] | None = None,
) -> Any:
    """The application of the class of an instance, with its methods bound to the instance.

    Args:
        before: What the application held before the instance was constructed. What the constructor added is served too.
        on_thread: Makes an endpoint that runs on the replica's threads out of a bound method that is no coroutine
            function.
    """
    frozen: FrozenApp = type(instance).__qserve_asgi__  # type: ignore[attr-defined]
    if frozen.app is None:
        return _built_by(frozen.original)
    if not isinstance(frozen.app, Starlette):
        return frozen.app

    def bind(route: BaseRoute) -> BaseRoute | None:
        # A mounted application may have got methods of classes that were decorated later.
        is_served = _belongs(route, type(instance)) and not _is_replaced(route, type(instance))
        return _bind(route, instance, on_thread) if is_served else None

    if before is not None and contents_of(type(instance)) != before:
        _warn_of_late_routes(frozen, before.routes, type(instance))
        bound = _with_additions(frozen, before, bind)
    else:
        _warn_of_late_routes(frozen, walk(getattr(frozen.original, "routes", ())), type(instance))
        if isinstance(frozen.original, Starlette):
            _warn_of_late_additions(frozen, type(instance))
        bound = copy_app(frozen.app, bind)
    if "openapi" in vars(bound):
        # A custom schema function describes the routes of the app it was written for: let it see what is served.
        frozen.original.router.routes[:] = bound.routes
    return _UnderPrefix(bound) if getattr(bound, "root_path", "") else bound


def _built_by(builder: Callable[[], Any]) -> Any:
    app = builder()
    if not callable(app) or _parameters_of(app) != 3:
        raise TypeError(
            f"{builder.__qualname__}(), with which @serve.ingress was called, returned no ASGI application."
        )
    app = _as_application(app)
    return _UnderPrefix(app) if getattr(app, "root_path", "") else app


def contents_of(cls: type) -> Contents | None:
    """What the application of an ingress class holds at this moment; None if it is not one that can be looked into."""
    app = cls.__qserve_asgi__.original  # type: ignore[attr-defined]
    if not hasattr(app, "routes"):
        return None
    return Contents([*walk(app.routes)], len(app.routes), {what: count(app) for what, count in _COUNTED.items()})


def _with_additions(frozen: FrozenApp, before: Contents, bind: ChangeRoute) -> Any:
    """The application with what its class serves and what the constructor has added."""
    served = {id(route) for route in walk(frozen.app.routes)}
    known = {id(route) for route in before.routes}
    late = known - served
    for route in walk(frozen.original.routes):
        if id(route) not in known:
            setattr(route, _SERVED, True)  # by what another instance in this process has added, too

    def change(route: BaseRoute) -> BaseRoute | None:
        return None if id(route) in late and not is_documentation(route) else bind(route)

    return copy_app(_as_application(frozen.original), change)


def _warn_of_late_additions(frozen: FrozenApp, cls: type) -> None:
    """Warn if the application was given more than routes after the class was decorated; routes may be for another."""
    late = [what for what, count in _COUNTED.items() if count(frozen.original) > count(frozen.app)]
    if late:
        logger.warning(
            "%s were added to the application after @serve.ingress had decorated %s and are not used: "
            "add them above the class.",
            " and ".join(late).capitalize(),
            cls.__qualname__,
        )


def _warn_of_late_routes(frozen: FrozenApp, routes: Iterable[BaseRoute], cls: type) -> None:
    """Warn of routes of the application that no class serves, because they were added after all of them."""
    served = {id(route) for route in walk(frozen.app.routes)}
    late = [route for route in routes if id(route) not in served and not hasattr(route, _SERVED)]
    owners = [(route, getattr(_function_of(route), _OWNER, cls)) for route in late if not is_documentation(route)]
    paths = [str(getattr(route, "path", route)) for route, owner in owners if owner in cls.__mro__]
    if paths:
        logger.warning(
            "Routes were added to the application after @serve.ingress had decorated %s and are not served, requests "
            "get 404: %s. Add them above the class.",
            *(cls.__qualname__, ", ".join(paths[:_MOST_SHOWN]) + (", ..." if len(paths) > _MOST_SHOWN else "")),
        )


class _Asgi2:
    """An application in the form of ASGI 2: it takes the scope, and gives what takes `receive` and `send`."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope)(receive, send)


def _parameters_of(app: Callable[..., Any]) -> int:
    """How many arguments an application takes, 3 where that cannot be told."""
    try:
        parameters = inspect.signature(app).parameters.values()
    except (TypeError, ValueError):
        return 3
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return 3
    return sum(each.default is each.empty and each.kind is not each.KEYWORD_ONLY for each in parameters)


class _UnderPrefix:
    """A FastAPI application made with the deprecated `root_path`, which FastAPI sets over that of the server.

    Paths begin with the prefix the deployment is served under, so with another root_path no route would match: the
    prefix wins, and the application's own counts where there is none.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._own, app.root_path = app.root_path, ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["root_path"] = scope.get("root_path") or self._own
        await self._app(scope, receive, send)


def _as_application(app: Any) -> Any:
    """The application itself; a FastAPI application that includes it, if it is an APIRouter."""
    fastapi = sys.modules.get("fastapi")
    if fastapi is not None and isinstance(app, fastapi.APIRouter):
        router, app = app, fastapi.FastAPI()
        app.include_router(router)
    return app


def _freeze(original: Any, cls: type) -> Any:
    app = _as_application(original)
    if not isinstance(app, Starlette):
        return app
    _claim(walk(app.routes), cls)
    for route in walk(original.routes):
        if _belongs(route, cls):
            setattr(route, _SERVED, True)
    return copy_app(app, lambda route: route if _belongs(route, cls) else None)


def _claim(routes: Iterable[BaseRoute], cls: type) -> None:
    """Write on each endpoint which class it is a method of.

    The function itself carries it, because names do not tell: a class may be defined again under the same name, and of
    two methods with one name only the second can be found in the class.
    """
    for route in routes:
        endpoint = _function_of(route)
        owner = endpoint and next((base for base in cls.__mro__ if _defines(base, endpoint)), None)
        if owner is not None:
            setattr(endpoint, _OWNER, owner)
            setattr(endpoint, _PLACES, getattr(endpoint, _PLACES, frozenset()) | {_place_of(route)})


def _place_of(route: Any) -> tuple[str, frozenset[str]]:
    return getattr(route, "path", ""), frozenset(getattr(route, "methods", None) or ())


def _defines(cls: type, function: Endpoint) -> bool:
    if any(getattr(value, "__func__", value) is function for value in vars(cls).values()):
        return True
    in_class_body, _, _ = function.__qualname__.rpartition(".")
    is_named_so = in_class_body == cls.__qualname__ and function.__module__ == cls.__module__
    return is_named_so and not hasattr(function, _OWNER)


def _belongs(route: BaseRoute, cls: type) -> bool:
    """Whether a class serves the route: one of the app itself, or of its own methods, inherited ones too."""
    function = _function_of(route)
    if function is None:
        return True
    owner = getattr(function, _OWNER, None)
    return owner in cls.__mro__ if owner is not None else not _is_method(function)


def _is_replaced(route: BaseRoute, cls: type) -> bool:
    """Whether a method that overrides the one of the route has such a route itself."""
    function = _function_of(route)
    owner = getattr(function, _OWNER, None)
    if function is None or owner not in cls.__mro__:
        return False
    return _place_of(route) in getattr(_unwrapped(_override(function, owner, cls)), _PLACES, ())


def _override(function: Endpoint, owner: type, cls: type) -> Any:
    """What a class that is derived from the owner of a method has put in its place; None if it has put nothing there.

    Static methods and what cannot be called take the place of no endpoint.
    """
    name = next((name for name, value in vars(owner).items() if _unwrapped(value) is function), None)
    bases = cls.__mro__[: cls.__mro__.index(owner)]
    found = None if name is None else next((vars(base)[name] for base in bases if name in vars(base)), None)
    return found if isinstance(found, classmethod) or _is_endpoint(found) else None


def _unwrapped(value: Any) -> Any:
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value


def _is_method(function: Endpoint) -> bool:
    """Whether a function that no class has claimed yet is a method all the same, of a class decorated later."""
    in_class_body, _, _ = function.__qualname__.rpartition(".")
    first = next(iter(inspect.signature(function).parameters), "")
    return bool(in_class_body) and not in_class_body.endswith("<locals>") and first == "self"


def _bind(
    route: BaseRoute, instance: object, on_thread: Callable[[MethodType], Callable[..., Any]] | None
) -> BaseRoute:
    method = _method_of(route, instance)
    if method is None:
        return route
    is_async = inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)
    # FastAPI before 0.135 streams no generators: it calls them like any other function
    is_list = inspect.isgeneratorfunction(method) and not hasattr(route, "stream_item_type")
    made = rebuild_route(route, method if on_thread is None or is_async or is_list else on_thread(method))
    setattr(made, _SERVED, True)
    return made


def _method_of(route: BaseRoute, instance: object) -> MethodType | None:
    """The method of an instance that a route calls; None if it calls something else."""
    endpoint = getattr(route, "endpoint", None)
    if isinstance(endpoint, MethodType) and endpoint.__self__ is instance:  # a route that the constructor has added
        return endpoint
    function = _function_of(route)
    owner = getattr(function, _OWNER, None)
    if function is None or owner is None:
        return None
    override = _override(function, owner, type(instance))
    if override is not None:
        return MethodType(_unwrapped(override), type(instance) if isinstance(override, classmethod) else instance)
    kinds = {type(value) for value in vars(owner).values() if getattr(value, "__func__", None) is function}
    if staticmethod in kinds:
        return None
    return MethodType(function, type(instance) if classmethod in kinds else instance)


def _function_of(route: BaseRoute) -> Endpoint | None:
    endpoint = getattr(route, "endpoint", None)
    return endpoint if _is_endpoint(endpoint) else None


def _is_endpoint(value: Any) -> bool:
    """Whether it is a function, or what a decorator such as `functools.cache` or a compiler makes of one."""
    if isinstance(value, FunctionType):
        return True
    is_bound_like_one = hasattr(type(value), "__get__") and not isinstance(value, MethodType)
    return callable(value) and is_bound_like_one and hasattr(value, "__qualname__") and hasattr(value, "__dict__")
