"""Code that travels by value: cloudpickle, with what a script's functions, classes and applications need beyond it.

Pickles name the functions of this module that make and fill things, and wait in Redis for the next version of qserve:
these functions keep their names and parameters.
"""

import ast
import functools
import inspect
import io
import sys
import sysconfig
import threading
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from pickle import PicklingError
from types import CodeType, FunctionType, ModuleType
from typing import Any, ClassVar, ForwardRef, NewType, ParamSpec, get_args

import cloudpickle
import pydantic.dataclasses
from starlette.datastructures import State

from qserve.deployments.driver_script import MAIN, can_run_again

_SCHEMA = ("__pydantic_core_schema__", "__pydantic_validator__", "__pydantic_serializer__")
"""What pydantic makes of a model. Models that refer to each other cannot be unpickled with it."""


@dataclass(frozen=True)
class _Loading:
    """One run of `loads`.

    Attributes:
        main: Stands for the script that the code comes from.
        models: Classes of which pydantic has to make validators again, once all is there.
    """

    main: ModuleType
    models: list[Any] = field(default_factory=list)


_loading: ContextVar[_Loading] = ContextVar("qserve_loading")


def dumps(value: object) -> bytes:
    """Pickle code by value, Starlette and FastAPI applications too.

    Raises:
        PicklingError: Something that it refers to cannot be pickled; the text names it where it can be found.
    """
    buffer = io.BytesIO()
    pickler = _CodePickler(buffer)
    try:
        pickler.dump(value)
    except Exception as exc:
        raise PicklingError(f"{_culprit(pickler.by_value)}{type(exc).__name__}: {exc}") from exc
    return buffer.getvalue()


def _culprit(codes: list[Any]) -> str:
    """The name that the last of these functions and classes gives to something that cannot be pickled."""
    for code in reversed(codes):
        for name, value in _names_used_by(code):
            if isinstance(value, FunctionType | type | ModuleType):
                continue
            try:
                _CodePickler(io.BytesIO()).dump(value)
            except Exception:
                return f"{name!r}, which {code.__qualname__!r} uses: "
    return ""


_LEFT_OUT = frozenset({"_abc_impl", "__dict__", "__weakref__", *_SCHEMA})
"""What is in a class, and not in its pickle."""


def _names_used_by(code: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(code, FunctionType):
        yield from ((name, value) for name, value in vars(code).items() if name not in _LEFT_OUT)
        return
    yield from inspect.getclosurevars(code).nonlocals.items()
    yield from inspect.getclosurevars(code).globals.items()


def loads(data: bytes, *, as_main: bool = False) -> Any:
    """What `dumps` pickled.

    Args:
        as_main: This process exists for that code: what its script defines becomes the `__main__` of this process, so
            that names are found there as they are in the script.

    Raises:
        Exception: It does not load here.
    """
    main = ModuleType(MAIN)
    if as_main:
        sys.modules[MAIN] = main
    loading = _Loading(main)
    token = _loading.set(loading)
    try:
        loaded = cloudpickle.loads(data)
        for model in loading.models:
            _rebuild_model(model)
    finally:
        _loading.reset(token)
    if not can_run_again(vars(main).get("__file__")):
        main.__class__ = _MainWithoutFile
    return loaded


class _MainWithoutFile(ModuleType):
    """A `__main__` that `multiprocessing` does not run again: its script would start and deploy once more.

    Code of the script finds its `__file__` all the same, because that is one of its globals.
    """

    @property
    def __file__(self) -> str:  # type: ignore[override]
        raise AttributeError("__file__")


def _rebuild_model(model: Any) -> None:
    if hasattr(model, "model_rebuild"):
        model.model_rebuild(force=True, raise_errors=model.__pydantic_complete__)
    else:
        pydantic.dataclasses.rebuild_dataclass(model, force=True)


_code_of_cloudpickle = cloudpickle.Pickler.dispatch_table[CodeType]
_NO_FILE = "<dynamic-code>"


class _CodePickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Carries more than cloudpickle.

    - Functions and classes of the script share one namespace, with the names that annotations mention as strings.
    - What installed packages keep at the top level of their modules, as sentinels, is found there and not copied.
    - Locks, thread locals, thread pools, context variables and caches arrive fresh; weak references pickle.
    """

    dispatch_table: ClassVar[ChainMap[Any, Any]]

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.by_value: list[Any] = []
        self._places: dict[str, dict[int, str]] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, FunctionType | type):
            reduced = super().reducer_override(obj)
            if not isinstance(reduced, tuple) or len(reduced) != 6:  # by reference
                return reduced
            self.by_value.append(obj)
            return _reduce_code(obj, reduced)
        if isinstance(obj, BaseException) and type(obj).__reduce__ is BaseException.__reduce__:
            return _make_exception, (type(obj), obj.args), vars(obj)
        if _is_template_cache(obj):
            return type(obj), (obj.capacity,)
        if self._may_be_a_name(obj) and isinstance(obj.__reduce_ex__(self.proto), str):
            return _reduce_name(obj)
        place = self._place_of(obj)
        return NotImplemented if place is None else (_find, tuple(place.split(":")))

    def _may_be_a_name(self, value: Any) -> bool:
        of_class = type(value)
        in_main = getattr(value, "__module__", "") == MAIN and of_class.__module__ != MAIN
        return in_main and of_class not in self.dispatch_table

    def _place_of(self, value: object) -> str | None:
        """ "module:name" of an object in the package that defines its type, where that package is an installed one."""
        package = (type(value).__module__ or "").partition(".")[0]
        if package not in self._places:
            self._places[package] = dict(_objects_of(package)) if _is_installed(package) else {}
        return self._places[package].get(id(value))


def _objects_of(package: str) -> Iterator[tuple[int, str]]:
    """Objects at the top level of a package's modules whose types are the package's own."""
    names = [name for name in list(sys.modules) if name.partition(".")[0] == package]
    for name in sorted(names, key=len, reverse=True):  # the shortest path comes last, and wins
        for key, value in list(getattr(sys.modules.get(name), "__dict__", {}).items()):
            if not isinstance(value, type) and (type(value).__module__ or "").partition(".")[0] == package:
                yield id(value), f"{name}:{key}"


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


# Functions and classes


def _reduce_code(code: Any, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """What cloudpickle makes of a function or class, put into the namespace of its script."""
    if "_sa_class_manager" in vars(code):
        raise PicklingError(f"{code.__qualname__!r} is a class that SQLAlchemy or SQLModel maps to a table")
    make, arguments, state, _, _, set_state = reduced
    if "__class__" in vars(code):  # a property, which only the namespace of a new class can have
        namespace = {**arguments[3], "__class__": state[0].pop("__class__")}
        arguments = (*arguments[:3], namespace, *arguments[4:])
    is_model = _SCHEMA[0] in vars(code)
    if is_model:
        kept = {name: value for name, value in state[0].items() if name not in _SCHEMA}
        kept[_AROUND] = _classes_in(kept.get(_AROUND))
        state = (kept, *state[1:])
    is_function = isinstance(code, FunctionType)
    script = vars(sys.modules[MAIN])
    known: dict[str, Any] = code.__globals__ if is_function else script
    in_main = code.__module__ == MAIN and known is script
    names = {}
    if in_main or is_function:
        names = {name: known[name] for name in _names_in_annotations(code) if name in known}
    if in_main and code.__name__ in known and known[code.__name__] is code:
        names[code.__name__] = code
    if in_main and is_function:
        make, arguments = _make_in_main, (make, *arguments)
    return make, arguments, (set_state, state, names, in_main, is_model), None, None, _set_state


_AROUND = "__pydantic_parent_namespace__"
"""Everything that was local where a model was defined, for the case that its annotations mention it."""


def _classes_in(namespace: dict[str, Any] | None) -> dict[str, type] | None:
    if namespace is None:
        return None
    values = {name: value() if type(value).__name__.endswith("WeakRef") else value for name, value in namespace.items()}
    return {name: value for name, value in values.items() if isinstance(value, type)}


def _reduce_code_object(code: CodeType) -> tuple[Any, ...]:
    make, arguments = _code_of_cloudpickle(code)
    # cloudpickle leaves the file's name out, and a traceback would show neither file nor line.
    return make, tuple(code.co_filename if each == _NO_FILE else each for each in arguments)


def _make_in_main(make: Callable[..., Any], code: object, namespace: dict[str, Any], *rest: object) -> Any:
    shared = vars(_loading.get().main)
    shared.update(namespace)
    return make(code, shared, *rest)


def _set_state(code: Any, carried: tuple[Any, ...]) -> None:
    set_state, state, names, in_main, is_model = carried
    if in_main:
        vars(_loading.get().main).update(names)
    elif isinstance(code, FunctionType):
        code.__globals__.update(names)
    set_state(code, state)
    if is_model:
        if _SCHEMA[0] in vars(code):  # of the class without fields that it was a moment ago
            delattr(code, _SCHEMA[0])
        _loading.get().models.append(code)


def _names_in_annotations(code: Any) -> set[str]:
    """Names in annotations that are strings, as `from __future__ import annotations` makes them all."""
    try:
        annotations = vars(code).get("__annotations__", {}) if isinstance(code, type) else code.__annotations__
    except NameError:  # Python 3.14 looks names up only now, and there may be none
        return set()
    return {name for annotation in annotations.values() for name in _names_in(annotation)}


def _names_in(annotation: object) -> Iterator[str]:
    if isinstance(annotation, ForwardRef):
        annotation = annotation.__forward_arg__
    if not isinstance(annotation, str):
        for argument in get_args(annotation):
            yield from _names_in(argument)
        return
    try:
        tree = ast.parse(annotation, mode="eval")
    except SyntaxError:  # a string in Literal or Annotated
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != annotation:
            yield from _names_in(node.value)


# Objects that arrive fresh, or as something that pickles


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
    return _cached, (cached.__wrapped__, cached.cache_parameters())


def _cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _attribute(value: Any, qualname: str) -> Any:
    for part in qualname.split("."):
        value = getattr(value, part, None)
    return value


_CodePickler.dispatch_table = ChainMap(
    {
        State: _reduce_state,
        type(threading.Lock()): _reduce_lock,
        type(threading.RLock()): _reduce_lock,
        threading.local: _reduce_thread_local,
        ContextVar: _reduce_context_variable,
        _Cached: _reduce_cached,
        CodeType: _reduce_code_object,
        ThreadPoolExecutor: _reduce_thread_pool,
        weakref.ref: _reduce_weak_reference,
        weakref.WeakKeyDictionary: _reduce_weak_dictionary,
        weakref.WeakValueDictionary: _reduce_weak_dictionary,
    },
    cloudpickle.Pickler.dispatch_table,
)
