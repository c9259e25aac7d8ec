"""Copies of Starlette and FastAPI applications with other routes.

The copy shares `state`, endpoints, middleware classes and lifespan hooks with its original, but has routers of its own,
so that the two can be given different routes. This module alone knows how Starlette and FastAPI work inside.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from starlette.applications import Starlette
from starlette.routing import BaseRoute, Host, Mount, Router

ChangeRoute = Callable[[BaseRoute], BaseRoute | None]


def walk(routes: Iterable[BaseRoute]) -> Iterator[BaseRoute]:
    """Yield all routes, with those of included routers and of mounted applications."""
    for route in routes:
        inner = _inner_routes(route)
        if inner is None:
            yield route
        else:
            yield from walk(inner)


def copy_app(app: Starlette, change: ChangeRoute) -> Starlette:
    """A copy of an application in which `change` has replaced each route, or dropped it by returning None."""
    made = copy.copy(app)
    made.router = _copy_router(app.router, change)
    made.user_middleware = list(app.user_middleware)
    made.exception_handlers = dict(app.exception_handlers)
    made.middleware_stack = None  # built at the first request
    if is_instrumented(app):
        made.build_middleware_stack = _builder_of(app).for_copy(made)  # type: ignore[method-assign]
    if hasattr(made, "setup"):
        _renew_docs(made)
    return made


def is_instrumented(app: Any) -> bool:
    """Whether something else builds the middlewares of an application, such as OpenTelemetry's instrumentation."""
    return "build_middleware_stack" in getattr(app, "__dict__", {})


class _Builder:
    """Builds the middlewares of a copy by what took the place of `build_middleware_stack` in its original.

    That knows the original alone, so the original lends itself for a moment.
    """

    _LENT = ("router", "user_middleware", "exception_handlers")

    def __init__(self, original: Starlette, build: Callable[[], Any], made: Starlette) -> None:
        self._original = original
        self._build = build
        self._made = made

    def for_copy(self, made: Starlette) -> "_Builder":
        """The same for another copy."""
        return _Builder(self._original, self._build, made)

    def __call__(self) -> Any:
        own = {name: getattr(self._original, name) for name in self._LENT}
        vars(self._original).update({name: getattr(self._made, name) for name in self._LENT})
        try:
            return self._build()
        finally:
            vars(self._original).update(own)


def _builder_of(app: Any) -> _Builder:
    build = app.build_middleware_stack
    return build if isinstance(build, _Builder) else _Builder(app, build, app)


def rebuild_route(route: Any, endpoint: Callable[..., Any]) -> BaseRoute:
    """The same route with another endpoint, whose signature says what parameters the route has."""
    options = {name: getattr(route, name) for name in _constructor_options(type(route)) if hasattr(route, name)}
    if getattr(route, "stream_item_type", None) is not None:
        del options["response_model"]  # it is None, and FastAPI finds it in the annotations of a streaming endpoint
    made: BaseRoute = type(route)(**{**options, "endpoint": endpoint})
    return made


def _inner_routes(route: Any) -> list[BaseRoute] | None:
    if _is_included(route):
        return list(route.original_router.routes)
    if isinstance(route, Mount | Host) and isinstance(route.app, Starlette | Router):
        return list(route.app.routes)
    return None


def _is_included(route: Any) -> bool:
    # FastAPI >= 0.140 keeps what include_router() added as a nested router; before, routes were copied.
    return hasattr(route, "original_router") and hasattr(route, "include_context")


def _copy_route(route: BaseRoute, change: ChangeRoute) -> BaseRoute | None:
    if _is_included(route):
        return _copy_included(route, change)
    inner = _inner_routes(route)
    if inner is None or not isinstance(route, Mount | Host):
        return change(route)
    if all(change(inside) is inside for inside in walk(inner)):
        return route  # nothing changes in it, and it may be of a kind that cannot be copied
    made = copy.copy(route)
    made.app = copy_app(route.app, change) if isinstance(route.app, Starlette) else _copy_router(route.app, change)
    if isinstance(made, Mount):
        made._base_app = made.app
    return made


def _copy_included(route: Any, change: ChangeRoute) -> BaseRoute:
    router = _copy_router(route.original_router, change)
    made: BaseRoute = type(route)(original_router=router, include_context=route.include_context)
    return made


def _copy_router(router: Any, change: ChangeRoute) -> Any:
    made = copy.copy(router)
    changed = (_copy_route(route, change) for route in router.routes)
    made.routes = [route for route in changed if route is not None]
    made.middleware_stack = _rewrap(router.middleware_stack, router.app, made.app)
    for name in ("on_startup", "on_shutdown", "_low_priority_routes"):
        if hasattr(router, name):
            setattr(made, name, list(getattr(router, name)))
    lifespan = router.lifespan_context
    if getattr(lifespan, "_router", None) is router:  # the default one, which runs its router's on_startup hooks
        made.lifespan_context = type(lifespan)(made)
    return made


def _rewrap(layer: Any, innermost: Any, replacement: Any) -> Any:
    """The same chain of middleware around another application."""
    if layer == innermost:
        return replacement
    if not hasattr(layer, "app"):
        return layer
    made = copy.copy(layer)
    made.app = _rewrap(layer.app, innermost, replacement)
    return made


def _renew_docs(app: Any) -> None:
    """Give a copy of a FastAPI application routes for its documentation that describe the copy, not the original."""
    kept = app.router.routes
    app.openapi_schema = None
    if hasattr(app, "_openapi_routes_version"):
        app._openapi_routes_version = None
    app.router.routes = []
    app.setup()
    fresh = {route.path: route for route in app.router.routes if is_documentation(route)}
    app.router.routes = [fresh.get(route.path, route) if is_documentation(route) else route for route in kept]


def is_documentation(route: Any) -> bool:
    """Whether FastAPI made the route, to show the documentation of its application."""
    endpoint = getattr(route, "endpoint", None)
    return getattr(endpoint, "__qualname__", "").startswith("FastAPI.setup.<locals>.")


def _constructor_options(kind: type) -> set[str]:
    names: set[str] = set()
    for cls in kind.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
        names |= {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            break
    return names - {"self"}
