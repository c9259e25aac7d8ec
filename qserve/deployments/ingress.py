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

from qserve.deployments.app_copy import copy_app, rebuild_route, walk

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=type)

_OWNER = "__qserve_class__"


@dataclass(frozen=True)
class FrozenApp:
    """The application of an ingress class as it was when the class was decorated."""

    app: Any
    original: Any


def ingress(app: Any) -> Callable[[C], C]:
    """Serve the routes of an ASGI application from a deployment. It stands below `@serve.deployment`.

    Methods that are decorated with `get`, `post`, ... of the application are called with `self`, the instance of the
    replica. A class serves the routes of the application and those of its own methods, as they are at this moment;
    what is added to the application later is not served. An empty class serves an existing application as it is.

    Args:
        app: FastAPI, APIRouter, Starlette, or any ASGI application.

    Raises:
        TypeError: `app` is no ASGI application.
        ValueError: What is decorated is no class, or a class with a `__call__` method.
    """
    if not callable(app):
        raise TypeError(f"@serve.ingress expects an ASGI application, not {app!r}.")

    def decorate(cls: C) -> C:
        if not inspect.isclass(cls):
            raise ValueError("@serve.ingress must be used with a class.")
        if any("__call__" in vars(base) for base in cls.__mro__):
            raise ValueError("Class passed to @serve.ingress may not have __call__ method.")
        cls.__qserve_asgi__ = FrozenApp(_freeze(app, cls), app)  # type: ignore[attr-defined]
        return cls

    return decorate


def bind_app(instance: object) -> Any:
    """The application of the class of an instance, with its methods bound to the instance."""
    frozen: FrozenApp = type(instance).__qserve_asgi__  # type: ignore[attr-defined]
    if not isinstance(frozen.app, Starlette):
        return frozen.app
    if isinstance(frozen.original, Starlette):
        _warn_of_late_additions(frozen, type(instance))
    bound = copy_app(frozen.app, lambda route: _bind(route, instance))
    if "openapi" in vars(bound):
        # A custom schema function describes the routes of the app it was written for: let it see what is served.
        frozen.original.router.routes[:] = bound.routes
    return _UnderPrefix(bound) if getattr(bound, "root_path", "") else bound


def _warn_of_late_additions(frozen: FrozenApp, cls: type) -> None:
    """Warn if the application was given more than routes after the class was decorated; routes may be for another."""
    counted: dict[str, Callable[[Any], int]] = {
        "startup hooks": lambda app: len(getattr(app.router, "on_startup", ())),
        "shutdown hooks": lambda app: len(getattr(app.router, "on_shutdown", ())),
        "middlewares": lambda app: len(app.user_middleware),
        "exception handlers": lambda app: len(app.exception_handlers),
    }
    late = [what for what, count in counted.items() if count(frozen.original) > count(frozen.app)]
    if late:
        logger.warning(
            "%s were added to the application after @serve.ingress had decorated %s and are not used: "
            "add them above the class.",
            " and ".join(late).capitalize(),
            cls.__qualname__,
        )


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


def _freeze(app: Any, cls: type) -> Any:
    fastapi = sys.modules.get("fastapi")
    if fastapi is not None and isinstance(app, fastapi.APIRouter):
        router, app = app, fastapi.FastAPI()
        app.include_router(router)
    if not isinstance(app, Starlette):
        return app
    _claim(walk(app.routes), cls)
    return copy_app(app, lambda route: route if _belongs(route, cls) else None)


def _claim(routes: Iterable[BaseRoute], cls: type) -> None:
    """Write on each endpoint which class it is a method of.

    The function itself carries it, because names do not tell: a class may be defined again under the same name, and of
    two methods with one name only the second can be found in the class.
    """
    for endpoint in filter(None, map(_function_of, routes)):
        owner = next((base for base in cls.__mro__ if _defines(base, endpoint)), None)
        if owner is not None:
            setattr(endpoint, _OWNER, owner)


def _defines(cls: type, function: FunctionType) -> bool:
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


def _is_method(function: FunctionType) -> bool:
    """Whether a function that no class has claimed yet is a method all the same, of a class decorated later."""
    in_class_body, _, _ = function.__qualname__.rpartition(".")
    first = next(iter(inspect.signature(function).parameters), "")
    return bool(in_class_body) and not in_class_body.endswith("<locals>") and first == "self"


def _bind(route: BaseRoute, instance: object) -> BaseRoute:
    function = _function_of(route)
    owner = getattr(function, _OWNER, None)
    if function is None or owner is None:
        return route
    kinds = {type(value) for value in vars(owner).values() if getattr(value, "__func__", None) is function}
    if staticmethod in kinds:
        return route
    receiver = type(instance) if classmethod in kinds else instance
    return rebuild_route(route, MethodType(function, receiver))


def _function_of(route: BaseRoute) -> FunctionType | None:
    endpoint = getattr(route, "endpoint", None)
    return endpoint if isinstance(endpoint, FunctionType) else None
