"""How a run goes: a cluster under load, faults at seeded random times, then quiet, then the verdicts.

A run of the suite is anything with a `name`, a `title`, `length(plan)` and `play(plan) -> Result`. Most are a
`LoadRun`, which only says what it does; those of another shape make their `Result` themselves.
"""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from random import Random
from typing import Protocol

import msgspec

from qserve.broker.keys import GROUP
from tests.faults.chaos import ledger
from tests.faults.chaos.cluster import Cluster, Setup
from tests.faults.chaos.faults import Fault, Injected
from tests.faults.chaos.ledger import Call
from tests.faults.chaos.load import LATE_S, Load, Task
from tests.faults.chaos.verdicts import Judgement, judge
from tests.support.serving import ROOT

_FIRST_FAULT_S = _CALM_S = 1.0
_QUIET_S = 15.0
"""How long queues may take to be empty once every call has its outcome."""


class Stage:
    """Where runs take place: each in a cluster of its own, or, in the slice, in one that the run before has left.

    Args:
        shared: A cluster is kept for the next run that wants the same, unless what it went through was violated.
    """

    def __init__(self, shared: bool = False) -> None:
        self._shared = shared
        self._kept: Cluster | None = None

    @contextmanager
    def cluster(self, setup: Setup, prepare: "Prepare | None") -> Iterator[Cluster]:
        """A cluster for the length of a block, in which every replica serves at the beginning."""
        kept, self._kept = self._kept, None
        if kept is not None and (kept.setup != setup or prepare is not None):
            kept.stop()
            kept = None
        cluster = kept or started(setup, prepare)
        try:
            cluster.wait_until_served()
            yield cluster
        except BaseException:
            cluster.stop()
            raise
        if self._shared and prepare is None:
            self._kept = cluster
        else:
            cluster.stop()

    def close(self) -> None:
        """Stop what is kept."""
        if self._kept is not None:
            self._kept.stop()
            self._kept = None


Prepare = Callable[[Cluster], None]


@dataclass(frozen=True)
class Plan:
    """How the suite is run this time.

    Attributes:
        scale: Lengths of runs are multiplied with it.
        is_slice: The five minutes for CI: every run is as short as it can be.
        shards: Runs that want one server get a Redis cluster instead; all of its servers die and freeze together.
    """

    seed: int
    scale: float = 1.0
    is_slice: bool = False
    shards: bool = False
    stage: Stage = field(default_factory=Stage)

    def dice(self, name: str) -> Random:
        """Random numbers of a run, the same for the same seed."""
        return Random(f"{self.seed} {name}")

    def seconds(self, full: float, short: float) -> float:
        """How long something takes that has these lengths in the full suite and in the slice."""
        return short if self.is_slice else full * self.scale


@dataclass
class Result:
    """What a run has shown: a row of the table.

    Attributes:
        faults: How often something was done.
        figures: What was measured, by name.
        failures: Violations that are not about one call.
    """

    run: str
    title: str
    seed: int
    faults: int = 0
    judgement: Judgement = field(default_factory=Judgement)
    figures: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether nothing was violated."""
        return not self.failures and not self.judgement.violations


class Run(Protocol):
    """One run of the suite."""

    @property
    def name(self) -> str:
        """How it is chosen on the command line, and called in the table."""

    @property
    def title(self) -> str:
        """What is done, in a few words."""

    def length(self, plan: Plan) -> float:
        """About how many seconds it takes, with everything; 0: it is no part of this plan."""

    def play(self, plan: Plan) -> Result:
        """Do it."""


@dataclass
class Evidence:
    """What a `LoadRun` leaves behind, for its checks; the cluster still runs, without load.

    Attributes:
        base: Keys in Redis before the load.
    """

    plan: Plan
    cluster: Cluster
    calls: dict[str, Call]
    strange: dict[str, list[ledger.Run]]
    injected: list[Injected]
    base: int
    result: Result

    def fail(self, text: str) -> None:
        """Note a violation that is not about one call."""
        self.result.failures.append(text)


Check = Callable[[Evidence], None]


@dataclass(frozen=True)
class LoadRun:
    """Faults under load.

    Attributes:
        faults: One of them at a time, in turn.
        every_s: From the beginning of one fault to the next, give or take 40 %; what takes longer is waited for.
        seconds, short_seconds: How long the load lasts, in the full suite and in the slice; 0: not in there.
        rate: Calls per second in the full suite; the slice has `slice_rate`.
        prepare: Called when the server runs and nothing else does yet: puts a proxy before it, say.
        watch: Entered with the cluster for as long as there is load: takes measurements, which it puts into the result.
        throughout: Excuses that hold for the whole run, because the load itself does the damage.
        checks: Look at what is left; see `checks`.
        prepares_shards: `prepare` knows a Redis cluster, too.
        needs_one_server: Its faults are about a server that is no cluster.
    """

    name: str
    title: str
    faults: tuple[Fault, ...] = ()
    every_s: float = 5.0
    seconds: float = 120.0
    short_seconds: float = 8.0
    short_every_s: float = 2.0
    load: Load = field(default_factory=Load)
    short_rate: float = 100.0
    setup: Setup = field(default_factory=Setup)
    prepare: Prepare | None = None
    watch: Callable[[Cluster, Result], AbstractContextManager[None]] = lambda cluster, result: nullcontext()
    throughout: Fault | None = None
    checks: tuple[Check, ...] = ()
    prepares_shards: bool = False
    needs_one_server: bool = False

    def length(self, plan: Plan) -> float:
        """The load, the start before it and what takes time after it."""
        seconds = plan.seconds(self.seconds, self.short_seconds)
        return seconds + 25 if seconds and (self._goes_with_shards or not plan.shards) else 0

    @property
    def _goes_with_shards(self) -> bool:
        is_prepared = self.prepare is None or self.prepares_shards
        own_server = self.needs_one_server or self.setup.sentinels or "server" in self.setup.environment
        return is_prepared and not own_server

    def play(self, plan: Plan) -> Result:
        """Start a cluster, hurt it under load, and judge."""
        dice, result = plan.dice(self.name), Result(self.name, self.title, plan.seed)
        setup = replace(self.setup, shards=self.setup.shards or plan.shards)
        setup = replace(setup, replicas=1) if plan.is_slice else setup
        with plan.stage.cluster(setup, self.prepare) as cluster:
            if setup.shards:
                cluster.meet_shards()
            base = len(cluster.stored())
            with self.watch(cluster, result):
                injected = self._hurt(cluster, plan, dice)
            result.faults = len(injected)
            if self.throughout is not None:
                injected.append(Injected(self.throughout, 0.0))
            calls, strange = ledger.read(cluster.ledgers, f"{self.name}-*")
            result.judgement = judge(calls.values(), injected)
            evidence = Evidence(plan, cluster, calls, strange, injected, base, result)
            for check in (queues_are_empty, *self.checks):
                check(evidence)
            if not result.holds:
                result.failures.append(f"what the processes said:\n{cluster.logs()}")
        return result

    def _hurt(self, cluster: Cluster, plan: Plan, dice: Random) -> list[Injected]:
        seconds = plan.seconds(self.seconds, self.short_seconds)
        every_s = self.short_every_s if plan.is_slice else self.every_s
        load = replace(self.load, rate=self.short_rate, durations=_shorter(self.load)) if plan.is_slice else self.load
        injected: list[Injected] = []
        with calling(cluster, load, seconds, dice, self.name):
            end = time.monotonic() + seconds
            at = time.monotonic() + _FIRST_FAULT_S
            for fault in itertools.cycle(self.faults) if self.faults else ():
                if at > end - 1:
                    break
                time.sleep(max(0.0, at - time.monotonic()))
                fault.inject(cluster, dice, injected)
                at = max(at + every_s * dice.uniform(0.6, 1.4), time.monotonic() + _CALM_S)
        return injected


def _shorter(load: Load) -> tuple[tuple[float, float], ...]:
    return tuple((share, min(seconds, 1.0)) for share, seconds in load.durations)


def started(setup: Setup, prepare: Prepare | None = None) -> Cluster:
    """A cluster that serves."""
    cluster = Cluster(setup)
    cluster.start_server()
    try:
        if prepare is not None:
            prepare(cluster)
        cluster.start()
    except BaseException:
        cluster.stop()
        raise
    return cluster


@contextmanager
def running(setup: Setup, prepare: Prepare | None = None) -> Iterator[Cluster]:
    """A cluster for the length of a block."""
    cluster = started(setup, prepare)
    try:
        yield cluster
    finally:
        cluster.stop()


@contextmanager
def calling(cluster: Cluster, load: Load, seconds: float, dice: Random, name: str = "c") -> Iterator[None]:
    """Load for some seconds; at the end of the block it is waited for, until every call has its outcome.

    Args:
        name: What the ids of its calls begin with; two loads of a cluster need two.
    """
    callers = [
        start_caller(cluster, Task(f"{name}-{number}", dice.getrandbits(32), load, seconds, cluster.gateway_urls, ""))
        for number in range(load.processes)
    ]
    try:
        for caller in callers:
            assert caller.stdout is not None
            assert caller.stdout.readline() == b"calling\n", cluster.logs()
        yield
        for caller in callers:
            caller.wait(seconds + 4 * LATE_S + 60)
            assert caller.returncode == 0, cluster.logs()
    finally:
        for caller in callers:
            assert caller.stdout is not None
            assert caller.stdin is not None
            caller.kill()
            caller.wait()
            caller.stdout.close()
            caller.stdin.close()


def start_caller(cluster: Cluster, task: Task) -> "subprocess.Popen[bytes]":
    """Start a process of the load, whose standard input and output are pipes."""
    task.ledger = str(cluster.ledgers / f"client-{task.name}")
    with (cluster.folder / f"client-{task.name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.faults.chaos.load", msgspec.json.encode(task).decode()],
            cwd=ROOT,
            env=cluster.environment_of("client"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )


def came_true(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether something came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def queues_are_empty(evidence: Evidence) -> None:
    """Once every call has its outcome nothing is queued or pending any more."""
    redis, keys = evidence.cluster.redis, evidence.cluster.keys

    def left() -> dict[str, tuple[int, int]]:
        found = {}
        for name in ("Safe", "Once"):
            pending = redis.xpending(keys.calls(name), GROUP)["pending"]
            if (length := int(redis.xlen(keys.calls(name)))) or pending:
                found[name] = (length, int(pending))
        return found

    if not came_true(lambda: not left(), _QUIET_S):
        evidence.fail(f"queued and pending entries are left: {left()}")


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def interleave(runs: Iterable[Run], parts: int, plan: Plan) -> list[list[Run]]:
    """Parts of about the same length, each longest run to the part that is shortest so far."""
    shares: list[list[Run]] = [[] for _ in range(parts)]
    for run in sorted(runs, key=lambda run: -run.length(plan)):
        min(shares, key=lambda share: sum(each.length(plan) for each in share)).append(run)
    return shares
