"""Instances of user classes as data: enums, dataclasses and pydantic models.

They travel as class name and content and are rebuilt only from classes the receiver has imported already: nothing is
imported because a message names it. Elsewhere they arrive as a plain dict (an enum member: as its value).
"""

import dataclasses
import sys
from enum import Enum
from functools import lru_cache
from importlib.machinery import ModuleSpec
from types import BuiltinFunctionType, ModuleType
from typing import Any


def find_class(module: str, qualname: str) -> type | None:
    """The class of that name, if it is imported already.

    Looks only into the `__dict__` of modules and classes, so that no `__getattr__` (lazy modules import there) and no
    descriptor runs.
    """
    found: object = sys.modules.get(module) or _main_as(module)
    if not isinstance(found, ModuleType):
        return None
    names = object.__getattribute__(found, "__dict__")
    for part in qualname.split("."):
        found = None if part.startswith("__") else names.get(part)
        if not isinstance(found, type):
            return None
        names = type.__getattribute__(found, "__dict__")
    return found if isinstance(found, type) else None


def _main_as(module: str) -> ModuleType | None:
    """The `__main__` of this process, if `python -m` runs the module of that name."""
    main = sys.modules.get("__main__")
    if not isinstance(main, ModuleType):
        return None
    spec = object.__getattribute__(main, "__dict__").get("__spec__")
    return main if isinstance(spec, ModuleSpec) and spec.name == module else None


def is_importable(cls: type) -> bool:
    """Whether another process can reach this class by its name once it has imported the module."""
    return cls.__module__ != "__main__" and find_class(cls.__module__, cls.__qualname__) is cls


def is_model(cls: type) -> bool:
    """Whether the class is a pydantic model; without importing pydantic."""
    base = getattr(sys.modules.get("pydantic.main"), "BaseModel", None)
    return base is not None and issubclass(cls, base)


def base_with_content(cls: type) -> type | None:
    """The built-in class, such as `list`, that gives instances content beside their attributes; None for most."""
    if cls.__new__ is object.__new__:  # type: ignore[comparison-overlap]
        return None
    base = next(base for base in cls.__mro__ if isinstance(base.__dict__.get("__new__"), BuiltinFunctionType))
    return None if base is object else base


_PICKLING = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
_CLASSES_KNOWN = 256
"""Of how many classes it is kept how they are pickled: to look takes a third of the time of packing an instance."""


@lru_cache(_CLASSES_KNOWN)
def says_how_to_pickle(cls: type) -> bool:
    """Whether the class of a dataclass or model says itself what of an instance travels, and how it is made again."""
    base: Any = sys.modules["pydantic.main"].BaseModel if is_model(cls) else object
    methods = ((getattr(cls, name, None), getattr(base, name, None)) for name in _PICKLING)
    return any(own is not usual and getattr(own, "__module__", "") != "dataclasses" for own, usual in methods)


def state_of(value: Any) -> dict[str, object] | None:
    """Fields and other attributes of a dataclass instance, as pickle would carry them; None if a field is not set."""
    names = [field.name for field in dataclasses.fields(value)]
    try:
        return {name: getattr(value, name) for name in names} | getattr(value, "__dict__", {})
    except AttributeError:
        return None


def model_state_of(value: Any) -> dict[str, object] | None:
    """Fields of a pydantic model, extra ones included, without private attributes. None if a field is not set."""
    content, names = vars(value), type(value).model_fields
    if not names.keys() <= content.keys():
        return None
    return {name: content[name] for name in names} | (value.__pydantic_extra__ or {})


def private_state_of(model: Any) -> dict[str, object] | None:
    """Private attributes of a pydantic model; None if its class has none."""
    private: dict[str, object] | None = getattr(model, "__pydantic_private__", None)
    if private is None:
        return None
    return {name: value for name, value in private.items() if type(value).__name__ != "PydanticUndefinedType"}


def rebuild_enum(module: str, qualname: str, name: str | None, value: object) -> object:
    """The member, or its value where the class is not known here."""
    cls = find_class(module, qualname)
    if cls is None or not issubclass(cls, Enum):
        return value
    member = cls.__members__.get(name or "")
    try:
        return cls(value) if member is None else member
    except (ValueError, TypeError):
        return value


def rebuild_dataclass(module: str, qualname: str, state: dict[str, Any]) -> object:
    """An instance with that state, made without running `__init__`; else the state."""
    cls = find_class(module, qualname)
    if cls is None or not dataclasses.is_dataclass(cls):
        return state
    names = {field.name for field in dataclasses.fields(cls)}
    others = {name: value for name, value in state.items() if name not in names}
    if not names <= state.keys():
        return state
    try:
        made = object.__new__(cls)
        for name in names:
            object.__setattr__(made, name, state[name])
        if others:
            made.__dict__.update(others)
    except (TypeError, AttributeError):
        return state
    return made


def rebuild_model(
    module: str,
    qualname: str,
    state: dict[str, Any],
    given: list[str],
    private: dict[str, Any] | None = None,
    is_whole: bool = True,
) -> object:
    """A model with that state, which its sender has validated; else the state.

    Args:
        private: Its private attributes, where its class has some.
        is_whole: These are all of them. Others, which cannot be sent, are set up as in a new model.
    """
    cls: Any = find_class(module, qualname)
    if cls is None or not is_model(cls):
        return state
    fields, attributes = cls.model_fields, cls.__private_attributes__
    extra = {name: value for name, value in state.items() if name not in fields}
    allows_extra = cls.model_config.get("extra") == "allow"
    if not fields.keys() <= state.keys() or (extra and not allows_extra):
        return state
    content = {name: state[name] for name in fields}
    known = {name: value for name, value in (private or {}).items() if name in attributes}
    try:
        made = cls.__new__(cls)
        made.__setstate__(
            {
                "__dict__": dict(content),
                "__pydantic_extra__": extra if allows_extra else None,
                "__pydantic_fields_set__": set(given),
                "__pydantic_private__": _defaults(attributes) | known if attributes and is_whole else None,
            }
        )
        if not is_whole and cls.__pydantic_post_init__:
            made.model_post_init(None)
            vars(made).update(content)
            made.__pydantic_private__.update(known)
    except Exception:  # user code of the model
        return state
    return made


def _defaults(attributes: dict[str, Any]) -> dict[str, object]:
    made = {name: attribute.get_default() for name, attribute in attributes.items()}
    return {name: value for name, value in made.items() if type(value).__name__ != "PydanticUndefinedType"}
