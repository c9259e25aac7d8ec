"""The methods of a user's class or function, each with all that is found out about it once, so that no call has to."""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial, partialmethod, singledispatchmethod
from inspect import Parameter
from typing import Any

CALL = "__call__"
HEALTH_CHECK = "check_health"

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


def _is_dispatched_to_coroutines(static: object) -> bool:
    return isinstance(static, singledispatchmethod) and all(
        inspect.iscoroutinefunction(each) for each in static.dispatcher.registry.values()
    )


def class_methods(instance: Any, on_thread: OnThread) -> dict[str, UserMethod]:
    """Methods of the class, except those that the instance has replaced: these may be replaced again at any time."""
    own = getattr(instance, "__dict__", {})
    names = (name for name in dir(type(instance)) if name not in own and (name == CALL or not name.startswith("__")))
    methods = {}
    for name in names:
        static = inspect.getattr_static(instance, name, None)
        if _is_callable(static) and callable(function := getattr(instance, name, None)):
            method = describe_method(function, on_thread)
            if _is_dispatched_to_coroutines(static):
                method = replace(method, run=function, is_async=True)
            methods[name] = method
    return methods


def available_methods(instance: Any) -> list[str]:
    """What is known to be callable by name, without running a property."""
    public = (name for name in dir(instance) if not name.startswith("__"))
    return [name for name in public if _is_callable(inspect.getattr_static(instance, name, None))]


def is_computed(instance: Any, name: str) -> bool:
    """Whether looking at the attribute runs user code: a property's, another descriptor's or `__getattr__`."""
    static = inspect.getattr_static(instance, name, None)
    return static is None or not _is_callable(static)


def has_health_check(instance: object) -> bool:
    """Whether there is a check that takes no arguments; a method of that name that needs some is for callers.

    What `__getattr__` gives for any name is none.
    """
    if not _is_callable(inspect.getattr_static(instance, HEALTH_CHECK, None)):
        return False
    try:
        inspect.signature(getattr(instance, HEALTH_CHECK)).bind()
    except TypeError:
        return False
    except ValueError:  # builtins tell no signature
        pass
    return True


def _is_callable(static: object) -> bool:
    return callable(static) or isinstance(static, staticmethod | classmethod | partialmethod | singledispatchmethod)


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
