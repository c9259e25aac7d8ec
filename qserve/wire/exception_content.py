"""What an exception holds: taken out of it, and put into one made without any code of its class."""

import builtins
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

Pack = Callable[[object], bytes]

_LONGEST_REPR = 200


class Content(NamedTuple):
    """Arguments and attributes of an exception."""

    args: tuple[Any, ...]
    attributes: dict[str, Any]


def is_group(kind: type) -> bool:
    """Whether the class is a group of exceptions, which holds others as its members."""
    return issubclass(kind, BaseExceptionGroup)


def packed_content(exc: BaseException, pack: Pack) -> bytes:
    """The content in bytes; never raises.

    An attribute that cannot be sent stays behind, an argument that cannot leaves its `repr` in its place.
    """
    try:
        content = _validation_content(exc, pack) if is_validation_error(type(exc)) else _content_of(exc)
        args = tuple(arg if _can(pack, arg) else _short_repr(arg) for arg in content.args)
        return pack((args, {name: value for name, value in content.attributes.items() if _can(pack, value)}))
    except BaseException:  # arguments may be anything
        return b""


def unpacked_content(data: bytes, unpack: Callable[[bytes], object]) -> Content | None:
    """Undo `packed_content`; None where there is nothing to be had."""
    try:
        args, attributes = cast(Content, unpack(data))
        allowed = {name: value for name, value in attributes.items() if not hasattr(BaseException, name)}
    except Exception:  # without its content it is still an error
        return None
    return Content(args, allowed) if isinstance(args, tuple) else None


def make_exception(cls: type[BaseException], content: Content) -> BaseException | None:
    """An instance with that content, made without any code of its class; None if that cannot be."""
    if is_validation_error(cls):
        return _make_validation_error(cls, content)
    base = _builtin_base(cls)
    try:
        made = _new(base, cls, content.args)
        if not is_group(cls):
            base.__init__(made, *content.args)
        for name, value in content.attributes.items():
            if hasattr(base, name) or _is_slot(cls, name):  # a field of the builtin, such as ImportError.name
                object.__setattr__(made, name, value)
            else:
                made.__dict__[name] = value
    except Exception:  # whatever does not fit
        return None
    return made


def _new(base: type[BaseException], cls: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    try:
        return base.__new__(cls, *args)
    except TypeError:
        if base is not MemoryError:  # it refuses to make classes that have another base first
            raise
        return cast(BaseException, Exception.__new__(cast(type[Exception], cls), *args))


def _content_of(exc: BaseException) -> Content:
    kind = type(exc)
    _, args, *state = cast(Any, _builtin_base(kind)).__reduce__(exc)
    if is_group(kind):
        args = args[:1]  # the members travel by themselves
    attributes = (state[0] if state and state[0] else {}) | dict(_slots_of(exc))
    return Content(args, {name: value for name, value in attributes.items() if not hasattr(BaseException, name)})


def _slots_of(exc: BaseException) -> Iterator[tuple[str, Any]]:
    for cls in type(exc).__mro__:
        for name, member in vars(cls).items():
            if isinstance(member, types.MemberDescriptorType) and vars(builtins).get(cls.__name__) is not cls:
                try:
                    yield name, member.__get__(exc)
                except AttributeError:  # it has no value
                    continue


def _is_slot(cls: type, name: str) -> bool:
    return any(isinstance(vars(each).get(name), types.MemberDescriptorType) for each in cls.__mro__)


def _builtin_base(cls: type[BaseException]) -> type[BaseException]:
    return next(cast(type[BaseException], base) for base in cls.__mro__ if vars(builtins).get(base.__name__) is base)


def _can(pack: Pack, value: object) -> bool:
    try:
        pack(value)
    except BaseException:  # `__reduce__` of a user
        return False
    return True


def _short_repr(value: object) -> str:
    try:
        return repr(value)[:_LONGEST_REPR]
    except BaseException:  # a user's __repr__
        return f"<{type(value).__name__}>"


# pydantic's ValidationError has its content outside of Python, and no class can derive from it.


def is_validation_error(cls: type) -> bool:
    """Whether the class is pydantic's ValidationError; without importing pydantic."""
    return cls is getattr(sys.modules.get("pydantic_core"), "ValidationError", None)


def _validation_content(exc: Any, pack: Pack) -> Content:
    lines = []
    for line in exc.errors(include_url=False, include_context=False):
        given = line.get("input")
        shown = given if _can(pack, given) else _short_repr(given)
        lines.append([line["type"], line["loc"], line["msg"], shown])
    return Content((exc.title, lines), {})


def _make_validation_error(cls: Any, content: Content) -> BaseException | None:
    custom = sys.modules["pydantic_core"].PydanticCustomError
    try:
        title, lines = content.args
        details = [{"type": custom(kind, msg), "loc": tuple(loc), "input": given} for kind, loc, msg, given in lines]
        return cast(BaseException, cls.from_exception_data(title, details))
    except Exception:  # whatever does not fit
        return None
