"""Code that travels by value: cloudpickle, with what a script's functions, classes and applications need beyond it.

Pickles name the functions of this module that make and fill things, and wait in Redis for the next version of qserve:
these functions keep their names and parameters.
"""

import ast
import inspect
import io
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pickle import PicklingError
from types import CodeType, FunctionType, ModuleType
from typing import Any, ClassVar, ForwardRef, get_args

import cloudpickle
import pydantic.dataclasses

from qserve.deployments.driver_script import MAIN, can_run_again
from qserve.deployments.pickled_objects import REDUCERS, PackageObjects, reduce_object
from qserve.wire.script_classes import is_struct, reduce_struct

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
        self._of_packages = PackageObjects()

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, FunctionType | type):
            reduced = super().reducer_override(obj)
            if not isinstance(reduced, tuple) or len(reduced) != 6:  # by reference
                return reduced
            self.by_value.append(obj)
            return _reduce_code(obj, reduced)
        reduced = reduce_object(obj, type(obj) in self.dispatch_table)
        return self._of_packages.reduce(obj) if reduced is NotImplemented else reduced


# Functions and classes


def _reduce_code(code: Any, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """What cloudpickle makes of a function or class, put into the namespace of its script."""
    if "_sa_class_manager" in vars(code):
        raise PicklingError(f"{code.__qualname__!r} is a class that SQLAlchemy or SQLModel maps to a table")
    if is_struct(code):
        reduced = reduce_struct(code, reduced)
    make, arguments, state, _, _, set_state = reduced
    if "__class__" in vars(code):  # a property, which only the namespace of a new class can have
        namespace = {**arguments[3], "__class__": state[0].pop("__class__")}
        arguments = (*arguments[:3], namespace, *arguments[4:])
    is_model = _SCHEMA[0] in vars(code)
    if is_model:
        kept = {name: value for name, value in state[0].items() if name not in _SCHEMA}
        if _AROUND in kept:
            kept[_AROUND] = _classes_in(kept[_AROUND])
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


_CodePickler.dispatch_table = ChainMap({**REDUCERS, CodeType: _reduce_code_object}, cloudpickle.Pickler.dispatch_table)
