"""Exceptions as data, and data as exceptions that `except` clauses of the caller recognise.

No code of user exceptions runs here: classes are only looked up among imported ones, and instances are made by the
builtin exception they derive from, with the arguments and attributes of the original.
"""

import traceback
import types
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, cast

import msgspec

from qserve import errors
from qserve.errors import QServeError, TaskError, TaskFailure, failure_of
from qserve.wire.exception_content import (
    Content,
    Pack,
    is_group,
    is_validation_error,
    make_exception,
    packed_content,
    unpacked_content,
)
from qserve.wire.messages import ErrorInfo
from qserve.wire.user_classes import find_class

_LONGEST_TEXT = 64 * 1024
_OWN = {name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, QServeError)}
_FIELDS = frozenset(TaskFailure._fields)
_SHADOWING = frozenset({"status", "code", "tell", *_FIELDS})
"""What qserve's classes define that a user's class may define, too."""
_DEEPEST = 8
"""Causes of causes, and groups in groups, that travel."""
_MOST_MEMBERS = 100
_MACHINERY = frozenset({"qserve", "qserve_workers", "asyncio", "concurrent"})
"""Packages whose frames stand between the replica and user code."""


def describe_error(exc: BaseException, pack: Pack) -> ErrorInfo:
    """The exception as data; never raises.

    Args:
        pack: Packs its arguments and attributes; what it refuses stays behind.
    """
    try:
        info = _describe(exc, pack, _DEEPEST)
        return msgspec.structs.replace(info, traceback_text=traceback_of(exc)[-_LONGEST_TEXT:])
    except BaseException:  # a class may lie about anything, and its methods may raise anything
        return ErrorInfo(code="", type_name="Exception", module="builtins", message="an error that cannot be described")


def _describe(exc: BaseException, pack: Pack, room: int) -> ErrorInfo:
    cls = type(exc)
    code = cls.__name__ if _OWN.get(cls.__name__) is cls and cls is not TaskError else ""
    type_name, module, message, origin = cls.__qualname__, cls.__module__, "", exc
    if isinstance(exc, TaskError):  # it came from another replica
        failure = failure_of(exc)
        type_name, module = failure.type_name or type_name, failure.module or module
        message, origin = failure.message, failure.cause or exc
    cause = origin.__cause__ if room else None
    members = origin.exceptions[:_MOST_MEMBERS] if isinstance(origin, BaseExceptionGroup) and room else ()
    return ErrorInfo(
        code=code,
        type_name=plain_text(type_name),
        module=plain_text(module),
        message=plain_text(message or text_of(exc))[:_LONGEST_TEXT],
        args=packed_content(origin, pack),
        cause=None if cause is None else _describe(cause, pack, room - 1),
        members=tuple(_describe(member, pack, room - 1) for member in members),
    )


def revive_error(info: ErrorInfo, unpack: Callable[[bytes], object]) -> QServeError:
    """The error a caller gets; never raises.

    Args:
        unpack: Undoes the `pack` of `describe_error`.
    """
    own = _OWN.get(info.code)
    if own is None:
        return _revive_foreign(info, unpack)
    if not issubclass(own, TaskError):
        content = unpacked_content(info.args, unpack)
        made = make_exception(own, content) if content else None
        return cast(QServeError, made) if made is not None else own(info.message)
    return own(
        info.message, type_name=info.type_name, module=info.module, traceback_text=info.traceback_text, cause=None
    )


def _revive_foreign(info: ErrorInfo, unpack: Callable[[bytes], object]) -> TaskError:
    cls = find_class(info.module, info.type_name)
    known = cls if cls is not None and issubclass(cls, Exception) else None
    content = unpacked_content(info.args, unpack)
    if known is not None and content is not None and is_group(known):
        content = Content(
            (*content.args, [_revive_inner(member, unpack) for member in info.members]), content.attributes
        )
    original = make_exception(known, content) if known is not None and content is not None else None
    error = None if known is None else _make_both(known, content or Content((info.message,), {}))
    if error is None:
        error = TaskError(info.message)
    error.tell(TaskFailure(info.message, info.type_name, info.module, info.traceback_text, original))
    if content is not None and type(error) is not TaskError:
        vars(error).update({name: value for name, value in content.attributes.items() if name in _FIELDS})
    if info.cause is not None:
        error.__cause__ = _revive_inner(info.cause, unpack)
        if original is not None:
            original.__cause__ = error.__cause__
    return error


def _revive_inner(info: ErrorInfo, unpack: Callable[[bytes], object]) -> Exception:
    """A cause, or the member of a group: the exception itself where its class is known, else a TaskError."""
    error = revive_error(info, unpack)
    original = failure_of(error).cause if isinstance(error, TaskError) else None
    return original if isinstance(original, Exception) else error


def _make_both(cls: type[Exception], content: Content) -> TaskError | None:
    both: type[TaskError] | None
    try:
        both = _task_error_and(cast(Hashable, cls))
    except TypeError:  # some class cannot be hashed
        both = None
    if both is None:
        return None
    args, attributes = content
    others = {name: value for name, value in attributes.items() if name not in _FIELDS and name != "_failure"}
    return cast(TaskError | None, make_exception(both, Content(args, others)) or make_exception(both, Content((), {})))


@lru_cache(maxsize=1024)
def _task_error_and(cls: Any) -> type[TaskError] | None:
    """A class that is TaskError and `cls`, where there can be one."""
    if issubclass(cls, StopIteration | StopAsyncIteration) or is_validation_error(cls):
        return None  # no future and no coroutine can raise the former, nothing can derive from the latter
    name = f"TaskError({cls.__name__})"
    body = {"__module__": TaskError.__module__, "__doc__": f"A {cls.__qualname__} raised in a replica.", "code": name}
    for each in reversed(cls.__mro__):  # what the class says of itself, qserve's own fields must not hide
        if each not in QServeError.__mro__ and each not in _OWN.values():
            body |= {name: value for name, value in vars(each).items() if name in _SHADOWING}
    try:
        return types.new_class(name, (TaskError, cls), exec_body=lambda names: names.update(body))
    except Exception:  # metaclasses and __init_subclass__ are user code
        return None


def text_of(exc: BaseException) -> str:
    """Its text, as `plain_text` says it; never raises."""
    try:
        return plain_text(exc)
    except BaseException:  # a user's __str__
        return "<its text cannot be had: str() of it raised>"


def traceback_of(exc: BaseException) -> str:
    """Its traceback from the user's code on, as `plain_text` says it; never raises."""
    first = exc.__traceback__
    while first is not None and str(first.tb_frame.f_globals.get("__name__")).partition(".")[0] in _MACHINERY:
        first = first.tb_next
    try:
        return plain_text("".join(traceback.format_exception(type(exc), exc, first or exc.__traceback__)))
    except BaseException:  # it looks into user objects
        return ""


def plain_text(text: object) -> str:
    """The text with its lone surrogates spelled out: neither Redis nor JSON nor msgpack takes them."""
    return str(text).encode("utf-8", "backslashreplace").decode()
