"""The methods of a user's class or function, each with all that is found out about it once, so that no call has to."""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial, partialmethod
from inspect import Parameter
from typing import Any

CALL = "__call__"

OnThread = Callable[..., Awaitable[Any]]
"""Runs a function, its first argument, on a thread of the replica."""


@dataclass(frozen=True, slots=True)
class UserMethod:
    """What a call runs.

    Attributes:
        run: Runs it and gives what it returns, wherever that is; to be awaited.
        is_async: It runs on the event loop, else on a thread.
        takes_request: It has a parameter that an HTTP request can be passed as.
        is_method: It is a function or method, not another callable.
    """

    run: Callable[..., Awaitable[Any]]
    is_async: bool
    takes_request: bool
    is_method: bool


def describe_method(function: Callable[..., Any], on_thread: OnThread) -> UserMethod:
    """Find out how a callable is run."""
    called = function.func if isinstance(function, partial) else function
    is_method = inspect.isroutine(called)
    if not is_method:
        called = getattr(called, CALL, called)
    takes_request = _takes_request(function)
    if inspect.isasyncgenfunction(called):
        return UserMethod(_deferred(function), True, takes_request, is_method)
    if inspect.iscoroutinefunction(called):
        return UserMethod(function, True, takes_request, is_method)
    return UserMethod(partial(on_thread, function), False, takes_request, is_method)


def class_methods(instance: Any, on_thread: OnThread) -> dict[str, UserMethod]:
    """Methods of the class, except those that the instance has replaced: these may be replaced again at any time."""
    own = getattr(instance, "__dict__", {})
    names = (name for name in dir(type(instance)) if name not in own and (name == CALL or not name.startswith("__")))
    found = ((name, callable_attribute(instance, name)) for name in names)
    return {name: describe_method(function, on_thread) for name, function in found if function is not None}


def callable_attribute(instance: Any, name: str) -> Callable[..., Any] | None:
    """A method, or a callable that the instance has; None if there is none of that name."""
    # Statically first: looking at a property would run it.
    static = inspect.getattr_static(instance, name, None)
    if not callable(static) and not isinstance(static, staticmethod | classmethod | partialmethod):
        return None
    found = getattr(instance, name, None)
    return found if callable(found) else None


def _deferred(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """An async generator function as a coroutine function that gives the generator."""

    async def start(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return start


def _takes_request(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins tell no signature
        return True
    return any(parameter.kind not in (Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD) for parameter in parameters)
