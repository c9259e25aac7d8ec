"""What user code does when its replica ends, within the time that is left for it."""

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)

_MOMENT_S = 0.1
"""For what was cancelled to clean up."""
_KEPT_S = 1.0
"""How much of the time is kept for what comes last."""


class LastWords:
    """Lets one thing after the other end. What they raise is logged: the replica goes all the same.

    Args:
        within_s: How long all of them may take together; None: as long as they please.
    """

    def __init__(self, deployment: str, within_s: float | None) -> None:
        self._deployment = deployment
        self._end_by = None if within_s is None else time.monotonic() + within_s

    async def of(self, what: str, work: Coroutine[Any, Any, object], *, is_last: bool = False) -> None:
        """Wait for something; where it takes too long it is cancelled, and said.

        Args:
            what: What it is, for the log.
            is_last: It may use up all the time.
        """
        limit_s = None
        if self._end_by is not None:
            limit_s = max(0.0, self._end_by - time.monotonic() - (0 if is_last else _KEPT_S))
        task = asyncio.get_running_loop().create_task(work)
        await asyncio.wait((task,), timeout=limit_s)
        if task.done():
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("Exception in %s of deployment %r", what, self._deployment, exc_info=error)
            return
        logger.warning(
            "Deployment %s: %s has not ended within the %.1f s that were left of graceful_shutdown_timeout_s. It is "
            "cancelled, and the replica ends.",
            *(self._deployment, what, limit_s),
        )
        task.cancel()
        task.add_done_callback(_forget)
        await asyncio.wait((task,), timeout=_MOMENT_S)


def _forget(task: "asyncio.Task[object]") -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.debug("what was cancelled at the end of a replica has failed", exc_info=task.exception())
