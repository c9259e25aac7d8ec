"""Objects that code refers to, and that do not pickle or would arrive as something else: how they are pickled.

Pickles name the functions of this module that make things, and wait in Redis for the next version of qserve: these
functions keep their names and parameters.
"""

import functools
import sys
import sysconfig
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context, ContextVar
from pathlib import Path
from pickle import PicklingError
from typing import Any, NewType, ParamSpec

from starlette.datastructures import State

from qserve.deployments.driver_script import MAIN


def reduce_object(value: Any, is_reduced: bool) -> Any:
    """What `__reduce__` should give for an object; NotImplemented where that is right as it is.

    Args:
        is_reduced: Its type has a reducer.
    """
    if isinstance(value, BaseException) and type(value).__reduce__ is BaseException.__reduce__:
        return _make_exception, (type(value), value.args), vars(value)
    if _is_template_cache(value):
        return type(value), (value.capacity,)
    in_main = getattr(value, "__module__", "") == MAIN and type(value).__module__ != MAIN
    if in_main and not is_reduced and isinstance(value.__reduce_ex__(4), str):
        return _reduce_name(value)
    return NotImplemented


class PackageObjects:
    """What installed packages keep at the top level of their modules, as sentinels: to be found there, not copied."""

    def __init__(self) -> None:
        self._places: dict[str, dict[int, tuple[str, str]]] = {}

    def reduce(self, value: object) -> Any:
        """What `__reduce__` should give; NotImplemented if the package that defines its type keeps no such object."""
        package = (type(value).__module__ or "").partition(".")[0]
        if package not in self._places:
            self._places[package] = dict(_objects_of(package)) if _is_installed(package) else {}
        place = self._places[package].get(id(value))
        if place is None and hasattr(type(value), "__getattr__") and _is_installed(package):
            place = _place_of(value)
        return NotImplemented if place is None else (_find, place)


def _objects_of(package: str) -> Iterator[tuple[int, tuple[str, str]]]:
    """Objects at the top level of a package's modules whose types are the package's own."""
    names = [name for name in list(sys.modules) if name.partition(".")[0] == package]
    for name in sorted(names, key=len, reverse=True):  # the shortest path comes last, and wins
        for key, value in list(getattr(sys.modules.get(name), "__dict__", {}).items()):
            if not isinstance(value, type) and (type(value).__module__ or "").partition(".")[0] == package:
                yield id(value), (name, key)


def _place_of(value: object) -> tuple[str, str] | None:
    """Where another installed package keeps an object, as Flask does its proxies, which are of a type of Werkzeug's."""
    for name in sorted(sys.modules, key=len):
        for key, kept in list(getattr(sys.modules.get(name), "__dict__", {}).items()):
            if kept is value and _is_installed(name.partition(".")[0]):
                return name, key
    return None


def _is_installed(package: str) -> bool:
    if package in _WITH_REDUCERS_OF_THEIR_OWN:
        return False
    file = getattr(sys.modules.get(package), "__file__", None)
    if file is None:
        return False
    places = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib")}
    return any(Path(file).resolve().is_relative_to(place) for place in places)


_WITH_REDUCERS_OF_THEIR_OWN = frozenset({"builtins", "typing", "functools", "threading", "contextvars", "cloudpickle"})


def _find(module: str, name: str) -> Any:
    __import__(module)
    return getattr(sys.modules[module], name)


def _is_template_cache(value: Any) -> bool:
    """Whether it is where Jinja keeps compiled templates, by references that do not travel."""
    return type(value).__name__ == "LRUCache" and type(value).__module__ == "jinja2.utils"


def _reduce_name(value: Any) -> tuple[Any, ...]:
    """What pickles as its name in the script, where the replica would not find it."""
    if isinstance(value, NewType):
        return _make_name, (NewType, (value.__name__, value.__supertype__))
    if isinstance(value, ParamSpec):
        return _make_name, (ParamSpec, (value.__name__,))
    if type(value).__name__ == "TypeVarTuple":
        return _make_name, (type(value), (value.__name__,))
    if type(value).__name__ == "TypeAliasType":
        return _make_name, (type(value), (value.__name__, value.__value__))
    raise PicklingError(f"{value!r} can be found only by its name in the script")


def _make_name(make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    made = make(*arguments)
    with suppress(AttributeError):
        made.__module__ = MAIN
    return made


def _make_exception(cls: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    return cls.__new__(cls, *args)  # its constructor may want other arguments than those it has passed on


def _reduce_weak_reference(reference: weakref.ref[Any]) -> tuple[Any, ...]:
    return weakref.ref, (reference(),)


def _reduce_weak_dictionary(dictionary: Any) -> tuple[Any, ...]:
    return type(dictionary), (dict(dictionary),)


def _restore_state(state: State, values: dict[str, Any]) -> None:
    state._state.update(values)


def _reduce_state(state: State) -> tuple[Any, ...]:
    # It answers every attribute from a dict that is not there yet while it is being unpickled.
    return State, (), dict(state._state), None, None, _restore_state


def _reduce_lock(lock: object) -> tuple[Any, ...]:
    return (threading.RLock if isinstance(lock, type(threading.RLock())) else threading.Lock), ()


def _reduce_thread_local(_: object) -> tuple[Any, ...]:
    return threading.local, ()


def _reduce_context_variable(variable: ContextVar[Any]) -> tuple[Any, ...]:
    try:
        return _context_variable, (variable.name, (Context().run(variable.get),))
    except LookupError:
        return _context_variable, (variable.name, ())


def _context_variable(name: str, default: tuple[Any, ...]) -> ContextVar[Any]:
    return ContextVar(name, default=default[0]) if default else ContextVar(name)


def _reduce_thread_pool(pool: ThreadPoolExecutor) -> tuple[Any, ...]:
    return ThreadPoolExecutor, (pool._max_workers, pool._thread_name_prefix)


_Cached: type = type(functools.lru_cache(len))


def _reduce_cached(cached: Any) -> Any:
    place = sys.modules.get(cached.__module__ or "")
    if cached.__module__ != MAIN and _attribute(place, cached.__qualname__) is cached:
        return cached.__qualname__
    attributes = {name: value for name, value in vars(cached).items() if name != "__wrapped__"}
    return _cached, (cached.__wrapped__, cached.cache_parameters()), attributes


def _cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _attribute(value: Any, qualname: str) -> Any:
    for part in qualname.split("."):
        value = getattr(value, part, None)
    return value


REDUCERS: dict[type, Callable[[Any], Any]] = {
    State: _reduce_state,
    type(threading.Lock()): _reduce_lock,
    type(threading.RLock()): _reduce_lock,
    threading.local: _reduce_thread_local,
    ContextVar: _reduce_context_variable,
    _Cached: _reduce_cached,
    ThreadPoolExecutor: _reduce_thread_pool,
    weakref.ref: _reduce_weak_reference,
    weakref.WeakKeyDictionary: _reduce_weak_dictionary,
    weakref.WeakValueDictionary: _reduce_weak_dictionary,
}
"""Reducers of types, for the dispatch table of a pickler."""
