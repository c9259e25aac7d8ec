"""Background tasks: started so that a failure is logged, ended so that none is left, and awake at the same moments or,
where many processes wait for one thing, at different ones."""

import asyncio
import logging
import os
import random
import time
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)

_INSIST_EVERY_S = 0.1
_SHORTEST = 0.1
_GOLDEN = 0.6180339887498949
"""Its multiples lie evenly between two integers, so processes do not all wake at once."""
CHANCE = random.Random()  # noqa: S311
"""For pauses that differ from process to process, and for ids that nobody has to guess.

Not the generator of the `random` module: programs that seed that one would all wait alike and make the same ids, and
would find numbers missing that were drawn here.
"""
os.register_at_fork(after_in_child=CHANCE.seed)
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


def until_next(interval_s: float) -> float:
    """How many seconds to sleep between things that are done every so often.

    Whatever a process does with the same interval it does at the same moments, which are its own. So one that has
    nothing to do wakes once for all of it, and its commands leave in one write.
    """
    pause = interval_s - (time.monotonic() + os.getpid() * _GOLDEN * interval_s) % interval_s
    return pause if pause > _SHORTEST * interval_s else pause + interval_s  # a timer may be a little early


def _ended(task: "asyncio.Task[None]") -> None:
    _running.discard(task)
    if not task.cancelled() and task.exception() is not None:
        logger.error("a background task failed", exc_info=task.exception())
