"""Exceptions as data, and data as exceptions that `except` clauses of the caller recognise.

No code of user exceptions runs here: classes are only looked up among imported ones, and instances are made by the
builtin exception they derive from, with the arguments and attributes of the original.
"""

import builtins
import traceback
import types
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, cast

from qserve import errors
from qserve.errors import QServeError, TaskError
from qserve.wire.messages import ErrorInfo
from qserve.wire.user_classes import find_class

_LONGEST_TEXT = 64 * 1024
_OWN = {name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, QServeError)}
_MACHINERY = frozenset({"qserve", "qserve_workers", "asyncio", "concurrent"})
"""Packages whose frames stand between the replica and user code."""


def describe_error(exc: BaseException, pack: Callable[[object], bytes]) -> ErrorInfo:
    """The exception as data; never raises.

    Args:
        pack: Packs its arguments; what it refuses stays behind.
    """
    try:
        return _describe(exc, pack)
    except Exception:  # a class may lie about anything
        return ErrorInfo(code="", type_name="Exception", module="builtins", message="an error that cannot be described")


def _describe(exc: BaseException, pack: Callable[[object], bytes]) -> ErrorInfo:
    cls = type(exc)
    code = cls.__name__ if _OWN.get(cls.__name__) is cls and cls is not TaskError else ""
    type_name, module, message, origin = cls.__qualname__, cls.__module__, "", exc
    if isinstance(exc, TaskError):  # it came from another replica
        type_name, module = exc.type_name or type_name, exc.module or module
        message, origin = exc.message, exc.cause or exc
    return ErrorInfo(
        code=code,
        type_name=_clean(type_name),
        module=_clean(module),
        message=_clean(message or _text_of(exc))[:_LONGEST_TEXT],
        traceback_text=_clean(_traceback_of(exc))[-_LONGEST_TEXT:],
        args=_packed_content(origin, pack),
    )


def revive_error(info: ErrorInfo, unpack: Callable[[bytes], object]) -> QServeError:
    """The error a caller gets; never raises.

    Args:
        unpack: Undoes the `pack` of `describe_error`.
    """
    content = _unpacked_content(info.args, unpack)
    own = _OWN.get(info.code)
    if own is None:
        return _revive_foreign(info, content)
    if not issubclass(own, TaskError):
        made = _make(own, content) if content else None
        return cast(QServeError, made) if made is not None else own(info.message)
    return own(
        info.message, type_name=info.type_name, module=info.module, traceback_text=info.traceback_text, cause=None
    )


_Content = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and attributes of an exception."""


def _revive_foreign(info: ErrorInfo, content: _Content | None) -> TaskError:
    cls = find_class(info.module, info.type_name)
    known = cls if cls is not None and issubclass(cls, Exception) else None
    error, cause = None, None
    if known is not None:
        cause = _make(known, content) if content else None
        error = _make_both(known, content or ((info.message,), {}))
    if error is None:
        error = TaskError(info.message)
    # not by __init__, which would go on to the one of the original class
    error.message = info.message
    error.type_name = info.type_name
    error.module = info.module
    error.traceback_text = info.traceback_text
    error.cause = cause
    return error


def _make_both(cls: type[Exception], content: _Content) -> TaskError | None:
    both: type[TaskError] | None
    try:
        both = _task_error_and(cast(Hashable, cls))
    except TypeError:  # some class cannot be hashed
        both = None
    if both is None:
        return None
    args, attributes = content
    visible = {name: value for name, value in attributes.items() if not hasattr(TaskError, name)}
    return cast(TaskError | None, _make(both, (args, visible)) or _make(both, ((), {})))


@lru_cache(maxsize=1024)
def _task_error_and(cls: Any) -> type[TaskError] | None:
    """A class that is TaskError and `cls`, where there can be one."""
    if issubclass(cls, StopIteration | StopAsyncIteration):
        return None  # no future and no coroutine can raise them
    names = {"__module__": TaskError.__module__, "__doc__": f"A {cls.__qualname__} raised in a replica."}
    bases: tuple[type, ...] = (TaskError, cls)
    try:
        return types.new_class(f"TaskError({cls.__name__})", bases, exec_body=lambda body: body.update(names))
    except Exception:  # metaclasses and __init_subclass__ are user code
        return None


def _builtin_base(cls: type[BaseException]) -> type[BaseException]:
    return next(cast(type[BaseException], base) for base in cls.__mro__ if vars(builtins).get(base.__name__) is base)


def _make(cls: type[BaseException], content: _Content) -> BaseException | None:
    """An instance with these arguments and attributes, made without any code of its class; None if that cannot be."""
    args, attributes = content
    base = _builtin_base(cls)
    try:
        made = base.__new__(cls, *args)
        base.__init__(made, *args)
        for name, value in attributes.items():
            if hasattr(base, name):  # a field of the builtin, such as ImportError.name
                object.__setattr__(made, name, value)
            else:
                made.__dict__[name] = value
    except Exception:  # whatever does not fit
        return None
    return made


def _content_of(exc: BaseException) -> _Content:
    _, args, *state = cast(Any, _builtin_base(type(exc))).__reduce__(exc)
    attributes = state[0] if state and state[0] else {}
    return args, {name: value for name, value in attributes.items() if not hasattr(BaseException, name)}


def _packed_content(exc: BaseException, pack: Callable[[object], bytes]) -> bytes:
    try:
        args, attributes = _content_of(exc)
        pack(args)
        return pack((args, {name: value for name, value in attributes.items() if _can(pack, value)}))
    except Exception:  # arguments may be anything
        return b""


def _can(pack: Callable[[object], bytes], value: object) -> bool:
    try:
        pack(value)
    except Exception:
        return False
    return True


def _unpacked_content(data: bytes, unpack: Callable[[bytes], object]) -> _Content | None:
    try:
        args, attributes = cast(_Content, unpack(data))
        allowed = {name: value for name, value in attributes.items() if not hasattr(BaseException, name)}
    except Exception:  # without its content it is still an error
        return None
    return (args, allowed) if isinstance(args, tuple) else None


def _text_of(exc: BaseException) -> str:
    try:
        return str(exc)
    except BaseException:  # a user's __str__
        return "<its text cannot be had: str() of it raised>"


def _traceback_of(exc: BaseException) -> str:
    first = exc.__traceback__
    while first is not None and str(first.tb_frame.f_globals.get("__name__")).partition(".")[0] in _MACHINERY:
        first = first.tb_next
    try:
        return "".join(traceback.format_exception(type(exc), exc, first or exc.__traceback__))
    except BaseException:  # it looks into user objects
        return ""


def _clean(text: object) -> str:
    """The text without lone surrogates, which the wire refuses."""
    return str(text).encode("utf-8", "backslashreplace").decode()
