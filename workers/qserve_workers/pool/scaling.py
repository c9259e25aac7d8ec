"""How many replicas a worker is to have, decided from how much there is to do. Pure: no clock, process or Redis here.

The bounds and the calls are those of the whole deployment. Every worker takes its share of both, and all come to the
same total, because they share by the sorted ids of the live nodes: each gets an equal part, the first ones the rest,
and none less than one.
"""

import math
from dataclasses import dataclass

from qserve.wire.autoscaling import Autoscaling
from qserve_workers.replica.replica_events import DemandMeasured

_STALE_S = 5.0
"""A demand this old says nothing any more."""


@dataclass(frozen=True)
class WorkerDemand:
    """What a replica has measured.

    Attributes:
        calls: Queued and running, over all nodes.
        waited_s: How long the first call that nobody has taken has waited.
        place, nodes: Which of how many nodes this worker belongs to.
        at: When it was measured.
    """

    calls: int
    waited_s: float
    place: int
    nodes: int
    at: float

    @classmethod
    def from_event(cls, measured: DemandMeasured, at: float) -> "WorkerDemand":
        """From what a replica has told."""
        return cls(measured.calls, measured.waited_s, measured.place, measured.nodes, at)

    def share(self, total: int) -> int:
        """How many of so many replicas are this worker's."""
        return max(1, total // self.nodes + (self.place < total % self.nodes))


class Scaler:
    """Decides on more and fewer replicas, and when.

    Attributes:
        bounds: (fewest, most) of this worker, instead of its share of the deployment's.
        decided: How many there are to be; 0 until something was measured.
        lowest: How many there must be whatever is measured.
    """

    def __init__(self, bounds: tuple[int, int] | None = None) -> None:
        self.bounds = bounds
        self.decided = self.lowest = 0
        self._more_since: float | None = None
        self._fewer_since: float | None = None
        self._enough = 0
        """The most that were wanted since fewer than now would do."""

    def decide(self, demand: WorkerDemand, policy: Autoscaling, *, current: int, ready: int, now: float) -> int:
        """How many replicas there are to be.

        Args:
            demand: As last measured.
            policy: When there are to be more or fewer.
            current: How many there are to be now.
            ready: How many of them take calls.
            now: On the clock of `demand.at`.
        """
        if now - demand.at > _STALE_S:
            return self.decided
        fewest, most = self.bounds or (demand.share(policy.min_replicas), demand.share(policy.max_replicas))
        self.lowest = fewest
        if not self.decided and policy.initial_replicas is not None:
            current = max(current, demand.share(policy.initial_replicas))
        wanted = demand.share(math.ceil(demand.calls / policy.target_ongoing_requests))
        if demand.waited_s >= policy.max_wait_s and ready >= current:  # else those on their way may be enough
            wanted = max(wanted, current + 1)
        wanted = min(most, max(fewest, wanted))
        self.decided = min(most, max(fewest, self._in_time(wanted, policy, current, now)))
        return self.decided

    def _in_time(self, wanted: int, policy: Autoscaling, current: int, now: float) -> int:
        """What is wanted, if it has been for long enough, else what there is."""
        self._more_since = (self._more_since or now) if wanted > current else None
        if wanted >= current:
            self._fewer_since, self._enough = None, 0
        else:
            self._fewer_since, self._enough = self._fewer_since or now, max(self._enough, wanted)
        if self._more_since is not None and now - self._more_since >= policy.upscale_delay_s:
            self._more_since = None
            return wanted
        if self._fewer_since is not None and now - self._fewer_since >= policy.downscale_delay_s:
            enough, self._fewer_since, self._enough = self._enough, None, 0
            return enough
        return current
