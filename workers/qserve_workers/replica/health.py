"""Asks the user's `check_health` again and again whether a replica is well."""

import asyncio
import logging
import time
from collections.abc import Callable

from qserve.wire.exceptions import text_of
from qserve_workers.calls.slots import Slots
from qserve_workers.user.user_code import UserCode
from qserve_workers.user.user_entry import what_was_raised

logger = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 3
"""So many make a replica ill."""
_LOOK_EVERY_S = 1.0


class HealthChecks:
    """The health of one replica. Belongs to its event loop, except for `overdue_s`.

    Args:
        tag: Tag of the replica.
        slots: Has the deployment's options as they are now.
        on_change: Called when `problem` has changed.

    Attributes:
        problem: What the last check raised; "" if the replica is well.
        failures: How many checks in a row have failed.
    """

    def __init__(self, tag: str, slots: Slots, on_change: Callable[[], None]) -> None:
        self.problem = ""
        self.failures = 0
        self._tag = tag
        self._slots = slots
        self._on_change = on_change
        self._begun_at: float | None = None

    @property
    def is_ill(self) -> bool:
        """Whether the replica is to be replaced."""
        return self.failures >= FAILURES_IN_A_ROW

    async def first(self, code: UserCode) -> None:
        """Check once. A replica that is ill from the start counts as one whose constructor failed.

        Raises:
            TimeoutError: The check took too long.
            Exception: What the check raised.
        """
        if not code.has_health_check:
            return
        limit = self._slots.spec.health_check_timeout_s
        try:
            async with asyncio.timeout(limit) as timeout:
                await code.check_health(lambda: None)
        except TimeoutError:
            if timeout.expired():
                raise TimeoutError(f"check_health has not returned within {limit:g} s.") from None
            raise

    async def go_on(self, code: UserCode) -> None:
        """Check for as long as the replica serves."""
        while code.has_health_check:
            await self._until_due()
            await self._check(code)

    def overdue_s(self) -> float | None:
        """How long the check under way has taken, if that is too long. From any thread.

        One that waits for a thread of the replica has not begun: a replica that is busy is not ill.
        """
        begun_at = self._begun_at
        taken = 0.0 if begun_at is None else time.monotonic() - begun_at
        return taken if taken > self._slots.spec.health_check_timeout_s else None

    async def _until_due(self) -> None:
        since = time.monotonic()
        while (left := since + self._slots.spec.health_check_period_s - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(left, _LOOK_EVERY_S))  # the period may change meanwhile

    async def _check(self, code: UserCode) -> None:
        name, before = self._slots.spec.name, self.problem
        try:
            await code.check_health(self._begin)
        except Exception as exc:
            error = what_was_raised(exc)
            self.failures += 1
            self.problem = (
                f"check_health has failed {self.failures} times in a row: {type(error).__name__}: {text_of(error)}"
            )
            logger.warning("Deployment %s: replica %s: %s", name, self._tag, self.problem, exc_info=error)
        else:
            if self.failures:
                logger.info("Deployment %s: check_health of replica %s succeeds again", name, self._tag)
            self.failures, self.problem = 0, ""
        finally:
            self._begun_at = None
        if self.problem != before:
            self._on_change()

    def _begin(self) -> None:
        self._begun_at = time.monotonic()
