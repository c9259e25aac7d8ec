"""Waiting until something is so, in threads and in event loops; a wait in vain fails and says what it was for."""

import asyncio
import inspect
import textwrap
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, overload

from tests.support.slowness import patience

Found = TypeVar("Found")

LIMIT_S = 30.0
"""How long anything may take that a test waits for, on an idle machine."""
_PAUSE_S = 0.005


def wait_until(
    condition: Callable[[], Found | None], limit_s: float = LIMIT_S, *, shows: Callable[[], object] | None = None
) -> Found:
    """Wait until a condition is true, and return what it gave.

    Args:
        condition: Is asked again and again.
        limit_s: How long it may take on an idle machine.
        shows: What to show if it stays false, such as the output of a process.

    Raises:
        AssertionError: The condition was still false after that time; the text quotes its source.
    """
    began = time.monotonic()
    while not (found := condition()):
        _give_up_after(limit_s, began, condition, found, shows)
        time.sleep(_PAUSE_S)
    return found


@overload
async def until(
    condition: Callable[[], Coroutine[Any, Any, Found | None]],
    limit_s: float = ...,
    *,
    shows: Callable[[], object] | None = ...,
) -> Found: ...
@overload
async def until(
    condition: Callable[[], Found | None], limit_s: float = ..., *, shows: Callable[[], object] | None = ...
) -> Found: ...
async def until(
    condition: Callable[[], object], limit_s: float = LIMIT_S, *, shows: Callable[[], object] | None = None
) -> object:
    """The same without blocking the event loop; the condition may be asynchronous."""
    began = time.monotonic()
    while True:
        answer = condition()
        found = await answer if inspect.isawaitable(answer) else answer
        if found:
            return found
        _give_up_after(limit_s, began, condition, found, shows)
        await asyncio.sleep(_PAUSE_S)


def joined(*threads: threading.Thread, limit_s: float = LIMIT_S) -> None:
    """Wait until threads have ended."""
    for thread in threads:
        thread.join(patience(limit_s))
        assert not thread.is_alive(), f"{thread.name} has not ended within {patience(limit_s):.1f} s"


def _give_up_after(
    limit_s: float,
    began: float,
    condition: Callable[[], object],
    found: object,
    shows: Callable[[], object] | None,
) -> None:
    waited = time.monotonic() - began
    if waited > (allowed := patience(limit_s)):
        more = f"\n{shows()}" if shows else ""
        raise AssertionError(
            f"waited {waited:.1f} s in vain ({limit_s:g} s on an idle machine, {allowed:.1f} s on this one now); "
            f"the last answer was {found!r} to:\n{_source(condition)}{more}"
        )


def _source(condition: Callable[[], object]) -> str:
    try:
        return textwrap.dedent(inspect.getsource(condition)).strip()
    except (OSError, TypeError):
        return repr(condition)
