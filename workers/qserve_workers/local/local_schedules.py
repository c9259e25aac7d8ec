"""Schedules in this process, whose moments come when a test lets time pass."""

from collections.abc import Iterator

from qserve.durable.cron import parse_when
from qserve.durable.schedules import Declared, Schedules, ScheduleWithMeta, call_of
from qserve.wire.call_record import DurableCall, DurableOptions, new_call_id
from qserve.wire.codec import Codec
from qserve_workers.local.local_durable import LocalClock
from qserve_workers.local.local_state import LocalState


class LocalSchedules(Schedules):
    """The schedules of one process, in its memory."""

    def __init__(self, state: LocalState, clock: LocalClock) -> None:
        super().__init__(state)
        self._clock = clock
        self._kept: dict[str, ScheduleWithMeta] = {}
        self._looked_at = self.now()

    def put_declared(self, deployments: frozenset[str], codec: Codec) -> None:
        """Put those declared schedules that call one of these deployments, also for the next test that deploys them."""
        for plan in Declared.plans:
            if plan.deployment in deployments:
                self.put(plan, codec)

    def get(self, name: str) -> ScheduleWithMeta | None:
        """The schedule of a name; None if there is none."""
        return self._kept.get(name)

    def write(self, schedule: ScheduleWithMeta) -> None:
        """Keep a schedule, in place of one with the same name."""
        self._kept[schedule.name] = schedule

    def remove(self, name: str) -> bool:
        """Remove a schedule; returns False if there is none."""
        return self._kept.pop(name, None) is not None

    def now(self) -> float:
        """Unix time, with what a test has let pass."""
        return self._clock.now()

    def due(self) -> Iterator[tuple[DurableCall, DurableOptions]]:
        """The calls of the moments that have come since this was asked last: one for each schedule at most."""
        since, self._looked_at = self._looked_at, self.now()
        for schedule in self._kept.values():
            if parse_when(schedule.when).last_between(max(since, schedule.created / 1000), self._looked_at) is not None:
                yield call_of(schedule, new_call_id())
