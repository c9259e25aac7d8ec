"""The rollout of a worker: what becomes of its replicas, decided from what they tell.

Pure: no clock, process, signal or Redis here. The pool feeds in births, deaths, events and the time, and carries out
the actions that come back. Construct first, take over after: a replica of a new revision is constructed while the old
ones serve, then as many old ones as it replaces are told to leave, and it reads its first call when they are gone. A
revision that never comes up removes nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import assert_never

from qserve.wire.spec import DEPLOY_FAILED, DEPLOYING, DRAINING, HEALTHY, SERVING, STANDBY, STARTING
from qserve_workers.pool.crash_loops import CrashLoop
from qserve_workers.pool.crew import Crew, Desired, TrackedReplica
from qserve_workers.pool.succession import batch_of, excess, leave_after, leave_first, next_to_apply, releases
from qserve_workers.replica.replica_events import (
    CallsCounted,
    ChangeApplied,
    ConstructionFailed,
    DeletionSeen,
    DemandMeasured,
    DeploymentSeen,
    HealthLost,
    ReconfigureFailed,
    ReplicaEvent,
    StateEntered,
    StillBusy,
    TurnWanted,
)

KILL_MARGIN_S = 2.0
"""How long after its own grace period a leaving replica is killed."""


# What a rollout tells the pool to do, and the world to know


@dataclass(frozen=True)
class Resize:
    """Keep this many processes, those on their way out included."""

    processes: int


@dataclass(frozen=True)
class Stop:
    """Tell a replica to finish its calls and leave."""

    pid: int


@dataclass(frozen=True)
class Release:
    """Tell a replica to leave as soon as it has no call in hand; if that does not come soon, it says so and stays."""

    pid: int


@dataclass(frozen=True)
class Serve:
    """Tell a replica that its turn has come: a standby one reads calls, as what it replaces has gone; one that serves
    and asked to reconfigure does so."""

    pid: int


@dataclass(frozen=True)
class Kill:
    """End a process that does not go by itself."""

    pid: int
    why: str


@dataclass(frozen=True)
class Status:
    """What the world is told about this worker; see `qserve.wire.spec.WorkerInfo`."""

    generation: int
    state: str
    wanted: int
    ready: int
    error: str = ""


@dataclass(frozen=True)
class Publish:
    """Tell the world; None: there is nothing deployed to tell about."""

    status: Status | None


Action = Resize | Stop | Release | Serve | Kill | Publish


class Rollout:
    """The replicas of one worker on their way to what is deployed.

    Args:
        concurrency: How many replicas there are to be.
        exact: Follow the deployment's num_replicas instead, once it is known.
        bounded: Scaled between bounds of this worker's own, whatever the deployment says.

    Attributes:
        wanted: How many replicas there are to be now.
        failures: Constructors that failed in this generation and since all were up.
    """

    def __init__(self, concurrency: int, *, exact: bool = False, bounded: bool = False) -> None:
        self.crew = Crew()
        self.wanted = concurrency
        self.failures = 0
        self._concurrency = concurrency
        self._exact = exact
        self._bounded = bounded
        self._crashes = CrashLoop()
        self._error = ""
        self._gave_up = False
        self._lowest = 0
        """How many must serve for the deployment to be healthy, where it is scaled; 0 as long as that is not known."""
        self._finished = 0
        self._came_up = False
        self._refused = False
        self._specs: dict[str, Desired] = {}
        """By revision, for as long as one of its replicas may be alive."""
        self._closing = False
        self._size = concurrency
        self._published: Status | None = None

    @property
    def is_scaled(self) -> bool:
        """Whether `scale` says how many replicas there are to be."""
        desired = self.crew.desired
        return self._bounded or (desired is not None and desired.autoscaling is not None)

    # What happened

    def born(self, pid: int, now: float, *, standby: bool = False, rank: int = 0) -> None:
        """The pool has started a process."""
        self.crew.by_pid[pid] = TrackedReplica(pid, now, standby, rank=rank)

    def missed_birth(self, error: str) -> None:
        """The pool could not start a process, and will try again."""
        self._error = error

    def died(self, pid: int, how: str, now: float) -> TrackedReplica | None:
        """A process has ended; returns what was known of it."""
        replica = self.crew.remove(pid)
        if replica is not None:
            self._crashes.note(replica, now)
        if replica is not None and replica.state == STARTING and not replica.leaving:
            self._count_failure(replica.revision, f"The process ended while it constructed the deployment: {how}.")
        return replica

    def report(self, event: ReplicaEvent, now: float) -> None:
        """A process has told an event; those of unknown processes are ignored."""
        replica = self.crew.by_pid.get(event.pid)
        if replica is None:
            return
        replica.id = event.replica or replica.id
        match event:
            case DeploymentSeen():
                self._deployed(Desired.from_event(event), event.num_replicas)
            case DeletionSeen():
                self.crew.desired, self._finished = None, 0
                self._begin_anew()
            case StateEntered():
                self._entered(replica, event, now)
            case ConstructionFailed():
                replica.leave(now)  # it ends by itself
                self._count_failure(event.revision, event.error)
            case ReconfigureFailed():
                if self.crew.desired is not None and event.generation >= self.crew.generation:
                    self._refused, self._error = True, event.error
            case HealthLost():
                self._crashes.note(replica, now)
                replica.ill, self._error = True, f"A replica is replaced: {event.error}"
            case TurnWanted() | ChangeApplied() | CallsCounted() | StillBusy() | DemandMeasured():
                replica.note(event)
            case _:
                assert_never(event)

    def stop(self, pid: int, now: float) -> bool:
        """Let one replica leave and be replaced; False if there is no such replica to stop."""
        replica = self.crew.by_pid.get(pid)
        if replica is None or replica.leaving:
            return False
        replica.leave(now)
        return True

    def scale(self, wanted: int, lowest: int) -> None:
        """Have more or fewer replicas; those that are too many leave when they are idle.

        Args:
            wanted: How many there are to be.
            lowest: How many are enough to be healthy.
        """
        self.wanted, self._lowest = wanted, lowest

    def close(self) -> None:
        """Let all replicas leave and start none any more."""
        self._closing = True

    # What to do about it

    def birth(self) -> tuple[bool, int, int]:
        """(standby, failures so far, rank) for the next process to start."""
        desired = self.crew.desired
        surge = desired is not None and desired.surge
        failures = max(self.failures, self._crashes.failures(self.wanted))
        return surge and any(r.has_capacity for r in self.crew.old), failures, self.crew.free_rank()

    def actions(self, now: float) -> list[Action]:
        """Everything to do now; the caller does it, in this order."""
        actions: list[Action] = [*self._overdue(now)]
        for replica in self._leaving():
            replica.leave(now)
            actions.append(Stop(replica.pid))
        actions += self._releases()
        actions += self._turns()
        size = self._new_size()
        if size != self._size:
            self._size = size
            actions.append(Resize(size))
        status = self._status()
        if status != self._published:
            self._published = status
            actions.append(Publish(status))
        return actions

    def next_deadline(self) -> float | None:
        """When `actions` must be asked again though nothing is told."""
        return min((at for at, _, _ in self._deadlines()), default=None)

    # Events, one by one

    def _deployed(self, seen: Desired, num_replicas: int | None) -> None:
        crew = self.crew
        if crew.desired is not None and seen.generation <= crew.generation:
            if seen.generation == crew.generation:  # perhaps known only by a replica's state until now
                self._follow(seen, num_replicas)
            return
        if crew.desired is None or crew.desired.revision != seen.revision:
            self._came_up = any(r.revision == seen.revision and r.has_capacity for r in crew.live)
        self._begin_anew()
        self._follow(seen, num_replicas)

    def _follow(self, seen: Desired, num_replicas: int | None) -> None:
        self.crew.desired = seen
        alive = {r.revision for r in self.crew.by_pid.values()}
        self._specs = {revision: spec for revision, spec in self._specs.items() if revision in alive}
        self._specs[seen.revision] = seen
        if self.is_scaled:
            return  # as many as there are, until somebody has measured how much there is to do
        before, self.wanted, self._lowest = self.wanted, self._concurrency, 0
        if self._exact:
            self.wanted = max(1, before if num_replicas is None else num_replicas)

    def _begin_anew(self) -> None:
        self.failures, self._error, self._gave_up, self._refused = 0, "", False, False
        self._crashes = CrashLoop()

    def _entered(self, replica: TrackedReplica, entered: StateEntered, now: float) -> None:
        if entered.revision and entered.generation > self.crew.generation:
            # It has seen a change before anyone told of it.
            before = self.crew.desired or Desired(0, "")
            self._deployed(replace(before, generation=entered.generation, revision=entered.revision), None)
        if entered.state == DRAINING and replica.state == STARTING and not replica.leaving and not self._closing:
            self._count_failure(replica.revision, "The process got SIGTERM while it constructed the deployment.")
        replica.enter(entered, now)
        desired = self.crew.desired
        if desired and replica.revision == desired.revision and replica.state in (STANDBY, SERVING):
            self._came_up, self._gave_up = True, False

    def _count_failure(self, revision: str, error: str) -> None:
        desired = self.crew.desired
        if desired is None or revision not in ("", desired.revision):
            return
        self.failures += 1
        self._error = error
        if not self._came_up and self.failures >= min(desired.most_failures, 3 * self.wanted):
            self._gave_up = True

    # Who goes, whose turn it is, and how many there are

    def _leaving(self) -> list[TrackedReplica]:
        crew = self.crew
        if self._closing:
            return crew.live
        if crew.desired is None:
            return crew.old
        if crew.desired.surge:
            leaving = leave_after(crew, self.wanted)
        else:
            leaving = leave_first(crew, self.wanted, gave_up=self._gave_up)
        return leaving + excess(crew, self.wanted, is_scaled=self.is_scaled)

    def _releases(self) -> Iterable[Action]:
        if self.is_scaled and not self._closing and self.crew.desired is not None:
            for replica in releases(self.crew, self.wanted):
                replica.released = True
                yield Release(replica.pid)

    def _turns(self) -> Iterable[Action]:
        for replica in self.crew.live:
            if replica.predecessors == set() and not replica.told_to_serve:
                replica.told_to_serve = True
                yield Serve(replica.pid)
        if self.crew.desired is not None and not self._refused and not self._closing:
            for replica in next_to_apply(self.crew, self.wanted):
                replica.told_to_apply = replica.asks_for
                yield Serve(replica.pid)

    def _new_size(self) -> int:
        crew = self.crew
        leaving = sum(r.leaving for r in crew.by_pid.values())
        if self._closing:
            return leaving
        fresh, old = len(crew.fresh), len(crew.old)
        if crew.desired is not None and not crew.desired.surge and not self._gave_up:
            return max(leaving + old + fresh, self.wanted)
        return leaving + old + max(fresh, self._fresh_wanted())

    def _fresh_wanted(self) -> int:
        if self.crew.desired is None:
            # One process waits for a new deploy; before the first, as many as it will probably be.
            return 1 if self._specs else self.wanted
        capacity = sum(r.has_capacity for r in self.crew.old)
        if self._gave_up:
            return int(capacity < self.wanted)
        if capacity:
            up = sum(r.state == SERVING for r in self.crew.fresh)
            return min(self.wanted, up + batch_of(self.wanted))
        return self.wanted

    # Deadlines and status

    def _deadlines(self) -> Iterable[tuple[float, int, str]]:
        for replica in self.crew.by_pid.values():
            if replica.killed:
                continue
            spec = self._specs.get(replica.revision) or self.crew.desired or Desired(0, "")
            if replica.leaving_since is not None:
                # One that still constructs has no calls to finish.
                grace = 0.0 if replica.starting_since is not None else spec.graceful_timeout_s
                limit = grace + KILL_MARGIN_S
                yield replica.leaving_since + limit, replica.pid, f"it had not left {limit:g} s after it was told to"
            elif replica.starting_since is not None and self.crew.is_fresh(replica):
                limit = spec.initialization_timeout_s
                yield replica.starting_since + limit, replica.pid, f"its constructor took over {limit:g} s"

    def _overdue(self, now: float) -> list[Action]:
        kills: list[Action] = []
        for at, pid, why in list(self._deadlines()):
            if at <= now:
                replica = self.crew.by_pid[pid]
                replica.killed = True
                if not replica.leaving:
                    replica.leave(now)
                    self._count_failure(replica.revision, f"The replica was killed: {why}.")
                kills.append(Kill(pid, why))
        return kills

    def _status(self) -> Status | None:
        if self.crew.desired is None:
            return None
        crew, generation, ready = self.crew, self.crew.generation, self.crew.ready
        state = DEPLOYING
        if self._gave_up or self._refused:
            state = DEPLOY_FAILED
        elif ready >= self.wanted and ready == len(crew.by_pid):
            state, self.failures, self._error = HEALTHY, 0, ""
        elif self.is_scaled and 0 < self._lowest <= ready and not crew.is_changing:
            state = HEALTHY
        if state != DEPLOYING:
            self._finished = generation
        return Status(self._finished, state, self.wanted, ready, self._error)
