"""The replicas of one worker as its parent process knows them, and what is deployed."""

from dataclasses import dataclass
from typing import assert_never

from qserve.wire.autoscaling import Autoscaling
from qserve.wire.spec import DRAINING, SERVING, STANDBY, STARTING
from qserve_workers.replica.replica_events import (
    CallsCounted,
    ChangeApplied,
    DemandMeasured,
    DeploymentSeen,
    StateEntered,
    StillBusy,
    TurnWanted,
)


@dataclass(frozen=True)
class Desired:
    """The deployment as the newest event has it."""

    generation: int
    revision: str
    surge: bool = True
    initialization_timeout_s: float = 600.0
    graceful_timeout_s: float = 20.0
    autoscaling: Autoscaling | None = None
    most_failures: int = 100

    @classmethod
    def from_event(cls, seen: DeploymentSeen) -> "Desired":
        """As a replica has seen it."""
        return cls(
            seen.generation,
            seen.revision,
            seen.surge,
            seen.initialization_timeout,
            seen.graceful_timeout,
            seen.autoscaling,
            seen.most_failures,
        )


@dataclass
class TrackedReplica:
    """One child of the pool."""

    pid: int
    born_at: float
    standby: bool
    id: str = ""
    state: str = ""
    revision: str = ""
    applied: int = 0
    starting_since: float | None = None
    up_since: float | None = None
    leaving_since: float | None = None
    killed: bool = False
    predecessors: set[int] | None = None
    """Pids that must be gone before it reads calls; None: its turn has not come."""
    told_to_serve: bool = False
    asks_for: int = 0
    told_to_apply: int = 0
    """Generations whose change needs a turn, which is asked for and then given."""
    running: int = 0
    handled: int = 0
    released: bool = False
    """It was told that it may leave, and has not answered."""
    ill: bool = False
    refusals: int = 0
    """How often it answered that it had calls to run."""
    rank: int = 0

    def enter(self, entered: StateEntered, now: float) -> None:
        """It has another state."""
        self.state = entered.state
        self.revision = entered.revision or self.revision
        if self.state == STARTING:
            self.starting_since = now
            return
        self.starting_since = None
        if self.state == DRAINING:
            self.leave(now)
        elif self.state in (STANDBY, SERVING):
            self.up_since = self.up_since or now
            self.applied = max(self.applied, entered.generation)

    def leave(self, now: float) -> None:
        """It leaves from now on, if it did not before."""
        self.leaving_since = self.leaving_since or now

    def note(self, told: TurnWanted | ChangeApplied | CallsCounted | StillBusy | DemandMeasured) -> None:
        """It has told what concerns nobody else."""
        match told:
            case TurnWanted():
                self.asks_for = told.generation
            case ChangeApplied():
                self.applied = max(self.applied, told.generation)
            case CallsCounted():
                self.running, self.handled = told.running, told.handled
            case StillBusy():
                self.running, self.released, self.refusals = told.running, False, self.refusals + 1
            case DemandMeasured():
                self.running = told.running
            case _:
                assert_never(told)

    @property
    def leaving(self) -> bool:
        """It was told to leave, or leaves by itself."""
        return self.leaving_since is not None

    @property
    def has_capacity(self) -> bool:
        """It serves, or will as soon as its predecessors are gone."""
        return self.state == SERVING or self.predecessors is not None


class Crew:
    """The replicas of one worker, seen by what is deployed.

    Attributes:
        by_pid: All of them, oldest first.
        desired: What is deployed, None when nothing is.
    """

    def __init__(self) -> None:
        self.by_pid: dict[int, TrackedReplica] = {}
        self.desired: Desired | None = None

    def remove(self, pid: int) -> TrackedReplica | None:
        """A process has ended; returns what was known of it."""
        for other in self.by_pid.values():
            if other.predecessors:
                other.predecessors.discard(pid)
        return self.by_pid.pop(pid, None)

    @property
    def generation(self) -> int:
        """Of what is deployed; 0 when nothing is."""
        return self.desired.generation if self.desired else 0

    @property
    def live(self) -> list[TrackedReplica]:
        """Those that do not leave."""
        return [r for r in self.by_pid.values() if not r.leaving]

    @property
    def fresh(self) -> list[TrackedReplica]:
        """Live and well ones of the newest revision, or without one yet: they will take the newest."""
        return [r for r in self.live if self.is_fresh(r)]

    @property
    def old(self) -> list[TrackedReplica]:
        """Live ones that are to be replaced: of an older revision, or ill."""
        return [r for r in self.live if not self.is_fresh(r)]

    def is_fresh(self, replica: TrackedReplica) -> bool:
        """Whether it is well and has the newest revision, or none yet."""
        if replica.ill:
            return False
        return not replica.revision or (self.desired is not None and replica.revision == self.desired.revision)

    def free_rank(self) -> int:
        """The lowest number that no live one of the newest revision has."""
        taken = {r.rank for r in self.fresh}
        return next(rank for rank in range(len(taken) + 1) if rank not in taken)

    @property
    def ready(self) -> int:
        """How many take calls with what is deployed."""
        return sum(r.state == SERVING and r.applied >= self.generation for r in self.fresh)

    @property
    def is_changing(self) -> bool:
        """Whether some replica still serves what was deployed before."""
        behind = any(r.state == SERVING and r.applied < self.generation for r in self.fresh)
        return behind or not all(map(self.is_fresh, self.by_pid.values()))

    @property
    def orphaned(self) -> set[int]:
        """Pids of old ones that leave, and that no live one waits for."""
        claimed = set().union(*(r.predecessors or () for r in self.live))
        return {r.pid for r in self.by_pid.values() if r.leaving and not self.is_fresh(r)} - claimed
