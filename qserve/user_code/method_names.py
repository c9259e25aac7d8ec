"""Which methods of user code can be called, as far as that can be seen without constructing anything."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final

CALL: Final = "__call__"
_MOST: Final = 500


def method_names(code: Callable[..., Any]) -> tuple[str, ...]:
    """Every name under which a replica might find something to call; () where it might be any name.

    A constructor may set attributes that are called, so what it names counts, too.
    """
    if not inspect.isclass(code):
        return (CALL,)
    if hasattr(code, "__getattr__") or code.__getattribute__ is not object.__getattribute__:
        return ()
    names = {name for name in dir(code) if name == CALL or not name.startswith("__")}
    for base in code.__mro__:
        names |= set(inspect.get_annotations(base))
        for value in vars(base).values():
            if inspect.isfunction(value) and value.__name__ in ("__init__", "reconfigure"):
                names |= set(value.__code__.co_names)
    return tuple(sorted(names)) if len(names) <= _MOST else ()


def problem_of(method: str, known: Sequence[str]) -> str:
    """What to say where a method cannot be called, "" where it may be.

    Args:
        method: "" for `__call__`.
        known: What `method_names` gave.
    """
    name = method or CALL
    if not known or name in known:
        return ""
    if tuple(known) == (CALL,):
        return f"a function has no method {name!r}"
    public = [each for each in known if not each.startswith("_")]
    return f"it has no method {name!r}" + (f": there are {', '.join(public[:10])}" if public else "")
