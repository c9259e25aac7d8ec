"""Celery's autoscaler, which counts what waits in the deployment's queue instead of Celery's tasks.

The replicas measure and report once a second, so nothing here asks Redis: this runs on Celery's event loop.
"""

import logging
import time
from typing import Any

from celery.worker import autoscale

logger = logging.getLogger(__name__)


class Autoscaler(autoscale.Autoscaler):  # type: ignore[misc]
    """What Celery sees as its autoscaler (`worker_autoscaler`); the pool's keeper calls it with every measurement."""

    max_concurrency: int
    min_concurrency: int

    @property
    def qty(self) -> int:
        """How many replicas there are to be."""
        decided: int = self.pool.keeper.decide(time.monotonic())
        return decided

    @property
    def processes(self) -> int:
        """How many there are to be so far: some may still be on their way in or out."""
        wanted: int = self.pool.keeper.rollout.wanted
        return wanted

    def maybe_scale(self, req: Any = None) -> None:
        """Follow the newest measurement, if there is one."""
        wanted, now = self.qty, self.processes
        if not wanted:  # not scaled, or nothing was measured yet
            return
        if wanted != now:
            logger.info("Deployment %s: from %d to %d replica(s) here", self.pool.keeper.deployment, now, wanted)
        # Never by the pool's grow and shrink: the rollout alone knows which process may be told to leave.
        self.pool.keeper.scale(wanted)

    def update(self, max: int | None = None, min: int | None = None) -> tuple[int, int]:  # noqa: A002
        """`celery control autoscale MAX MIN`: other bounds for this worker.

        Raises:
            ValueError: This worker is not scaled, or the bounds are none.
        """
        keeper = self.pool.keeper
        if not keeper.rollout.is_scaled:
            raise ValueError(f"{keeper.deployment} is not scaled: deploy it with autoscaling_config=")
        most = max if max is not None else self.max_concurrency
        fewest = min if min is not None else self.min_concurrency
        if not 1 <= fewest <= most:
            raise ValueError(f"autoscale {most} {fewest} is refused: MIN has to be at least 1, and no more than MAX")
        self.max_concurrency, self.min_concurrency = most, fewest
        keeper.scaler.bounds = (fewest, most)
        self.maybe_scale()
        return most, fewest

    def info(self) -> dict[str, int]:
        """For `celery inspect stats`."""
        keeper = self.pool.keeper
        return {"max": self.max_concurrency, "min": self.min_concurrency, "current": keeper.rollout.wanted}
