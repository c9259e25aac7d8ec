"""Background tasks: started so that a failure is logged, and ended so that none is left."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)

_INSIST_EVERY_S = 0.1
_running: set["asyncio.Task[None]"] = set()


def spawn(work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
    """Start `work` as a task. It is referred to until it ends, and its failure is logged."""
    task = asyncio.get_running_loop().create_task(work)
    _running.add(task)
    task.add_done_callback(_ended)
    return task


async def end(*tasks: "asyncio.Task[None] | None") -> None:
    """Cancel tasks and wait until they have ended.

    Cancels again and again: before Python 3.12 `asyncio.wait_for`, and what is built on it, may swallow a cancellation
    that arrives in the same moment as what it waits for (https://github.com/python/cpython/issues/86296).
    """
    waiting = {task for task in tasks if task is not None}
    while waiting:
        for task in waiting:
            task.cancel()
        _, waiting = await asyncio.wait(waiting, timeout=_INSIST_EVERY_S)


def _ended(task: "asyncio.Task[None]") -> None:
    _running.discard(task)
    if not task.cancelled() and task.exception() is not None:
        logger.error("a background task failed", exc_info=task.exception())
