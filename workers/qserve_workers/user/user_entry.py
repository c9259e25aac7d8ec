"""The one way into user code: whatever it raises ends what was asked of it, and nothing else.

`except Exception` lets some of what user code raises pass: the panics of Rust extensions, `SystemExit`,
`GeneratorExit`, a `CancelledError` that nobody asked for. Two of these would end the event loop, and with it every
other call of the replica. Here they become exceptions like all others.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from qserve.wire.exceptions import text_of

Result = TypeVar("Result")

_OTHER_THREAD = "SQLite objects created in a thread"
_WHERE_CODE_RUNS = (
    "The modules, the `def __init__` and the `def` methods of a deployment run on threads of their own, and its "
    "`async def` code on that of the event loop. Open the connection where it is used, or with check_same_thread=False."
)


class UserCodeEscape(RuntimeError):
    """User code raised something that is no `Exception`; this one is raised in its place.

    Attributes:
        raised: What user code raised.
    """

    def __init__(self, raised: BaseException) -> None:
        super().__init__(f"user code raised {type(raised).__name__}({text_of(raised)}), which ends this call only")
        self.raised = raised


async def enter(function: Callable[..., Awaitable[Result]], /, *args: Any, **kwargs: Any) -> Result:
    """Run user code that is to be awaited.

    Raises:
        Exception: What user code raised; a `UserCodeEscape` in place of what is no `Exception`.
        CancelledError: The task was cancelled from outside.
    """
    try:
        return await function(*args, **kwargs)
    except Exception as exc:
        if type(exc).__module__ == "sqlite3" and str(exc).startswith(_OTHER_THREAD) and not hasattr(exc, "__notes__"):
            exc.add_note(_WHERE_CODE_RUNS)
        raise
    except BaseException as exc:
        if _is_cancellation(exc):
            raise
        raise UserCodeEscape(exc) from exc


def what_was_raised(error: BaseException) -> BaseException:
    """The exception as user code raised it."""
    return error.raised if isinstance(error, UserCodeEscape) else error


def _is_cancellation(exc: BaseException) -> bool:
    """Whether somebody ends the task, or the event loop has ended before it, and user code has no say in it."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return True
    return isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling() > 0
