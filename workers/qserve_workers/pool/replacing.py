"""What a worker does with its replicas, decided from what they report. Pure: no clock, process, signal or Redis here.

The pool feeds in births, deaths, reports and the time, and carries out the actions that come back. Construct first,
take over after: a replica of a new revision is constructed while the old ones serve, then as many old ones as it
replaces are told to leave, and it reads its first call when they are gone. A revision that never comes up removes
nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from qserve.wire.options import Autoscaling
from qserve.wire.spec import DEPLOY_FAILED, DEPLOYING, DRAINING, HEALTHY, SERVING, STANDBY, STARTING
from qserve_workers.pool.orders import Action, Kill, Publish, Release, Resize, Serve, Status, Stop

KILL_MARGIN_S = 2.0
"""How long after its own grace period a leaving replica is killed."""


@dataclass
class Desired:
    """The deployment as the newest report has it."""

    generation: int
    revision: str
    surge: bool = True
    initialization_timeout_s: float = 600.0
    graceful_timeout_s: float = 20.0
    autoscaling: Autoscaling | None = None


@dataclass
class Replica:
    """One child of the pool."""

    pid: int
    born_at: float
    standby: bool
    id: str = ""
    state: str = ""
    revision: str = ""
    applied: int = 0
    starting_since: float | None = None
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
    refusals: int = 0
    """How often it answered that it had calls to run."""

    def counted(self, report: Mapping[str, Any]) -> None:
        """It has told how many calls it has in hand."""
        self.running = report.get("running", self.running)
        self.handled = report.get("handled", self.handled)
        if report["event"] == "busy":
            self.released, self.refusals = False, self.refusals + 1

    @property
    def leaving(self) -> bool:
        return self.leaving_since is not None

    @property
    def has_capacity(self) -> bool:
        """It serves, or will as soon as its predecessors are gone."""
        return self.state == SERVING or self.predecessors is not None


@dataclass
class Rollout:
    """The replicas of one worker on their way to what is deployed.

    Args:
        concurrency: How many replicas there are to be.
        exact: Follow the deployment's num_replicas instead, once it is known.
        bounded: Scaled between bounds of this worker's own, whatever the deployment says.
    """

    concurrency: int
    exact: bool = False
    bounded: bool = False
    replicas: dict[int, Replica] = field(default_factory=dict)
    desired: Desired | None = None
    failures: int = 0
    """Constructors that failed in this generation and since all were up."""
    error: str = ""
    gave_up: bool = False
    _wanted: int = 0
    _lowest: int = 0
    """How many must serve for the deployment to be healthy, where it is scaled; 0 as long as that is not known."""
    _finished: int = 0
    _came_up: bool = False
    _refused: bool = False
    _specs: dict[str, Desired] = field(default_factory=dict)
    """By revision, for as long as one of its replicas may be alive."""
    _closing: bool = False
    _size: int = 0
    _published: Status | None = None

    def __post_init__(self) -> None:
        self._wanted = self._size = self.concurrency

    @property
    def is_scaled(self) -> bool:
        """Whether `scale` says how many replicas there are to be."""
        return self.bounded or (self.desired is not None and self.desired.autoscaling is not None)

    # What happened

    def born(self, pid: int, now: float, *, standby: bool = False) -> None:
        """The pool has started a process."""
        self.replicas[pid] = Replica(pid, now, standby)

    def died(self, pid: int, how: str) -> Replica | None:
        """A process has ended; returns what was known of it."""
        replica = self.replicas.pop(pid, None)
        for other in self.replicas.values():
            if other.predecessors:
                other.predecessors.discard(pid)
        if replica is not None and replica.state == STARTING and not replica.leaving:
            self._count_failure(replica.revision, f"The process ended while it constructed the deployment: {how}.")
        return replica

    def report(self, report: Mapping[str, Any], now: float) -> None:
        """A process has reported an event; unknown processes and events are ignored."""
        replica = self.replicas.get(report.get("pid", 0))
        if replica is None:
            return
        replica.id = report.get("replica") or replica.id
        match report.get("event"):
            case "deployed":
                self._deployed(report)
            case "deleted":
                self._deleted()
            case "state":
                self._changed_state(replica, report, now)
            case "failed":
                replica.leaving_since = replica.leaving_since or now  # it ends by itself
                self._count_failure(report.get("revision", ""), report.get("error", ""))
            case "asks_to_apply":
                replica.asks_for = report["generation"]
            case "applied":
                replica.applied = max(replica.applied, report["generation"])
            case "reconfigure_failed" if self.desired and report["generation"] >= self.desired.generation:
                self._refused, self.error = True, report.get("error", "")
            case "stats" | "demand" | "busy":
                replica.counted(report)

    def stop(self, pid: int, now: float) -> bool:
        """Let one replica leave and be replaced; False if there is no such replica to stop."""
        replica = self.replicas.get(pid)
        if replica is None or replica.leaving:
            return False
        replica.leaving_since = now
        return True

    @property
    def wanted(self) -> int:
        """How many replicas there are to be."""
        return self._wanted

    @property
    def ready(self) -> int:
        """How many take calls with what is deployed."""
        generation = self.desired.generation if self.desired else 0
        return sum(r.state == SERVING and r.applied >= generation for r in self._fresh())

    def scale(self, wanted: int, lowest: int) -> None:
        """Have more or fewer replicas; those that are too many leave when they are idle.

        Args:
            wanted: How many there are to be.
            lowest: How many are enough to be healthy.
        """
        self._wanted, self._lowest = wanted, lowest

    def close(self) -> None:
        """Let all replicas leave and start none any more."""
        self._closing = True

    # What to do about it

    def birth(self) -> tuple[bool, int]:
        """(standby, failures so far) for the next process to start."""
        surge = self.desired is not None and self.desired.surge
        return surge and any(r.has_capacity for r in self._old()), self.failures

    def actions(self, now: float) -> list[Action]:
        """Everything to do now; the caller does it, in this order."""
        actions: list[Action] = [*self._overdue(now)]
        if self._closing:
            leaving = self._live()
        elif self.desired is not None and not self.desired.surge:
            leaving = self._stop_first()
        else:
            leaving = self._replace()
        for replica in leaving:
            replica.leaving_since = now
            actions.append(Stop(replica.pid))
        actions += map(Release, self._releases())
        for replica in self._live():
            if replica.predecessors == set() and not replica.told_to_serve:
                replica.told_to_serve = True
                actions.append(Serve(replica.pid))
        for replica in self._next_to_apply():
            replica.told_to_apply = replica.asks_for
            actions.append(Serve(replica.pid))
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
        """When `actions` must be asked again though nothing is reported."""
        return min((at for at, _, _ in self._deadlines()), default=None)

    # Events, one by one

    def _deployed(self, report: Mapping[str, Any]) -> None:
        generation = report["generation"]
        if self.desired is not None and generation <= self.desired.generation:
            if generation == self.desired.generation:  # perhaps known only by a replica's state until now
                self._follow(report)
            return
        if self.desired is None or self.desired.revision != report["revision"]:
            self._came_up = any(r.revision == report["revision"] and r.has_capacity for r in self._live())
        self.failures, self.error, self.gave_up, self._refused = 0, "", False, False
        self._follow(report)

    def _follow(self, report: Mapping[str, Any]) -> None:
        before = self.desired or Desired(0, "")
        self.desired = Desired(
            report["generation"],
            report["revision"],
            report.get("surge", before.surge),
            report.get("initialization_timeout", before.initialization_timeout_s),
            report.get("graceful_timeout", before.graceful_timeout_s),
            msgspec.convert(report.get("autoscaling"), Autoscaling | None),
        )
        alive = {r.revision for r in self.replicas.values()}
        self._specs = {revision: spec for revision, spec in self._specs.items() if revision in alive}
        self._specs[self.desired.revision] = self.desired
        if self.is_scaled:
            return  # as many as there are, until somebody has measured how much there is to do
        self._wanted, self._lowest = self.concurrency, 0
        if self.exact:
            self._wanted = max(1, report.get("num_replicas", self._wanted))

    def _deleted(self) -> None:
        self.desired = None
        self.failures, self.error, self.gave_up, self._refused, self._finished = 0, "", False, False, 0

    def _changed_state(self, replica: Replica, report: Mapping[str, Any], now: float) -> None:
        if report.get("revision") and report["generation"] > (self.desired.generation if self.desired else 0):
            self._deployed(report)  # it has seen a change before anyone reported it
        replica.state = report["state"]
        replica.revision = report.get("revision") or replica.revision
        if replica.state == STARTING:
            replica.starting_since = now
            return
        replica.starting_since = None
        if replica.state == DRAINING:
            replica.leaving_since = replica.leaving_since or now
        elif replica.state in (STANDBY, SERVING):
            replica.applied = max(replica.applied, report.get("generation", 0))
            if self.desired and replica.revision == self.desired.revision:
                self._came_up, self.gave_up = True, False

    def _count_failure(self, revision: str, error: str) -> None:
        if self.desired is None or revision not in ("", self.desired.revision):
            return
        self.failures += 1
        self.error = error
        if not self._came_up and self.failures >= min(100, 3 * self._wanted):
            self.gave_up = True

    # Who is who

    def _live(self) -> list[Replica]:
        return [r for r in self.replicas.values() if not r.leaving]

    def _fresh(self) -> list[Replica]:
        """Replicas of the newest revision, or without one yet: they will take the newest."""
        return [r for r in self._live() if self._is_fresh(r)]

    def _old(self) -> list[Replica]:
        return [r for r in self._live() if not self._is_fresh(r)]

    def _is_fresh(self, replica: Replica) -> bool:
        return not replica.revision or (self.desired is not None and replica.revision == self.desired.revision)

    @property
    def _batch(self) -> int:
        return max(1, self._wanted // 5)

    # Who goes

    def _replace(self) -> list[Replica]:
        """Whom to stop when new replicas are constructed first; pairs each new one with those it replaces."""
        fresh, old = self._fresh(), self._old()
        if self.desired is None:
            return old
        leaving = [r for r in old if not r.has_capacity]
        serving_old = [r for r in old if r.has_capacity]
        covered = sum(r.has_capacity for r in fresh)
        for replica in fresh:
            if replica.state == STANDBY and replica.predecessors is None:
                covered += 1
                keep = max(0, self._wanted - covered)
                gone, serving_old = serving_old[: len(serving_old) - keep], serving_old[-keep:] if keep else []
                leaving += gone
                # Those stopped earlier for a replacement that died before its turn still have to go first.
                replica.predecessors = {r.pid for r in gone} | self._orphaned()
        if covered:
            surplus = len(serving_old) - max(0, self._wanted - covered)
            leaving += serving_old[: max(0, surplus)]
        return leaving + self._excess(fresh)

    def _orphaned(self) -> set[int]:
        claimed = set().union(*(r.predecessors or () for r in self._live()))
        return {r.pid for r in self.replicas.values() if r.leaving and not self._is_fresh(r)} - claimed

    def _stop_first(self) -> list[Replica]:
        """Whom to stop when there is no room for old and new at once."""
        fresh, old = self._fresh(), self._old()
        leaving = [r for r in old if not r.has_capacity]
        serving_old = [r for r in old if r.has_capacity]
        if not self.gave_up:
            changing = max(0, self._wanted - sum(r.has_capacity for r in self._live()))
            leaving += serving_old[: max(0, self._batch - changing, len(serving_old) - self._wanted)]
        for replica in fresh:  # constructed as standby under an earlier, surging generation
            if replica.state == STANDBY and replica.predecessors is None:
                replica.predecessors = self._orphaned()
        return leaving + self._excess(fresh)

    def _next_to_apply(self) -> list[Replica]:
        """Whose turn it is to reconfigure: a few at a time, the others serve meanwhile."""
        if self.desired is None or self._refused or self._closing:
            return []
        generation, live = self.desired.generation, self._live()
        busy = sum(r.told_to_apply == generation and r.applied < generation for r in live)
        asking = [r for r in live if r.asks_for == generation and r.told_to_apply < generation]
        return asking[: max(0, self._batch - busy)]

    def _excess(self, fresh: list[Replica]) -> list[Replica]:
        """Replicas of the newest revision beyond the wanted number: those not serving first, then the youngest."""
        too_many = max(0, len(fresh) - self._wanted)
        youngest_first = [r for r in fresh[::-1] if not (self.is_scaled and r.state == SERVING)]
        return sorted(youngest_first, key=lambda r: r.state == SERVING)[:too_many]

    def _releases(self) -> list[int]:
        """Whom to let go where replicas are scaled: those that seem idle first, then the youngest, each in its turn."""
        if not self.is_scaled or self._closing or self.desired is None:
            return []
        serving = [r for r in self._fresh() if r.state == SERVING]
        too_many = len(serving) - self._wanted - sum(r.released for r in serving)
        staying = sorted((r for r in serving[::-1] if not r.released), key=lambda r: (r.running > 0, r.refusals))
        going = staying[: max(0, too_many)]
        for replica in going:
            replica.released = True
        return [r.pid for r in going]

    def _new_size(self) -> int:
        leaving = sum(r.leaving for r in self.replicas.values())
        if self._closing:
            return leaving
        fresh, old = len(self._fresh()), len(self._old())
        if self.desired is not None and not self.desired.surge and not self.gave_up:
            return max(leaving + old + fresh, self._wanted)
        return leaving + old + max(fresh, self._fresh_wanted())

    def _fresh_wanted(self) -> int:
        if self.desired is None:
            # One process waits for a new deploy; before the first, as many as it will probably be.
            return 1 if self._specs else self._wanted
        capacity = sum(r.has_capacity for r in self._old())
        if self.gave_up:
            return int(capacity < self._wanted)
        if capacity:
            up = sum(r.state == SERVING for r in self._fresh())
            return min(self._wanted, up + self._batch)
        return self._wanted

    # Deadlines and status

    def _deadlines(self) -> Iterable[tuple[float, int, str]]:
        for replica in self.replicas.values():
            if replica.killed:
                continue
            spec = self._specs.get(replica.revision) or self.desired or Desired(0, "")
            if replica.leaving_since is not None:
                # One that still constructs has no calls to finish.
                grace = 0.0 if replica.starting_since is not None else spec.graceful_timeout_s
                limit = grace + KILL_MARGIN_S
                yield replica.leaving_since + limit, replica.pid, f"it had not left {limit:g} s after it was told to"
            elif replica.starting_since is not None and self._is_fresh(replica):
                limit = spec.initialization_timeout_s
                yield replica.starting_since + limit, replica.pid, f"its constructor took over {limit:g} s"

    def _overdue(self, now: float) -> list[Action]:
        kills: list[Action] = []
        for at, pid, why in list(self._deadlines()):
            if at <= now:
                replica = self.replicas[pid]
                replica.killed = True
                if not replica.leaving:
                    replica.leaving_since = now
                    self._count_failure(replica.revision, f"The replica was killed: {why}.")
                kills.append(Kill(pid, why))
        return kills

    def _is_changing(self, generation: int) -> bool:
        """Whether some replica still serves what was deployed before."""
        behind = any(r.state == SERVING and r.applied < generation for r in self._fresh())
        return behind or not all(map(self._is_fresh, self.replicas.values()))

    def _status(self) -> Status | None:
        if self.desired is None:
            return None
        generation, ready = self.desired.generation, self.ready
        state = DEPLOYING
        if self.gave_up or self._refused:
            state = DEPLOY_FAILED
        elif ready >= self._wanted and ready == len(self.replicas):
            state, self.failures, self.error = HEALTHY, 0, ""
        elif self.is_scaled and 0 < self._lowest <= ready and not self._is_changing(generation):
            state = HEALTHY
        if state != DEPLOYING:
            self._finished = generation
        return Status(self._finished, state, self._wanted, ready, self.error)
