"""`celery -A qserve_workers beat -S qserve_workers.beat:Scheduler`: submits what is scheduled when it is due."""

import logging
from typing import Any

from celery import beat

from qserve.broker.instance.state import State
from qserve.broker.payloads import Payloads
from qserve.broker.redis_errors import CommandRefused
from qserve.durable.schedules import Schedules
from qserve.errors import QServeError
from qserve.wire.messages import Signer

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
"""How soon a schedule that is added is noticed."""


class Scheduler(beat.Scheduler):  # type: ignore[misc]
    """Keeps nothing itself: what is scheduled, and what was submitted last, stands in the state of the instance.

    So it may be stopped, started anew, and run several times, on one machine or many: each call is submitted once.
    """

    def __init__(self, app: Any, **options: Any) -> None:
        settings = app.settings
        signer = Signer(settings.secrets)
        self._schedules = Schedules(State(settings.redis_url, settings.keys, signer))
        self._payloads = Payloads(settings.keys, signer, settings.out_of_line_bytes)
        super().__init__(app, **options)

    def setup_schedule(self) -> None:
        """There is nothing to set up."""

    def tick(self, *_args: Any, **_kwargs: Any) -> float:
        """Submit what is due; returns after how many seconds to look again."""
        try:
            return min(max(self._schedules.fire_due(self._payloads), 0.0) + 0.002, _LOOK_EVERY_S)
        except (QServeError, CommandRefused) as exc:
            logger.error("Cannot look at the schedules: %s. Next try in %g s.", exc, _LOOK_EVERY_S)
            return _LOOK_EVERY_S

    @property
    def info(self) -> str:
        """For the banner."""
        return "    . schedules -> those of the qserve instance"
