"""Runs in which processes die at the points that QSERVE_FAILPOINT names: each row of the table, again and again."""

import asyncio
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.faults.chaos.cluster import Cluster, Server, Setup
from tests.faults.chaos.faults import REPLICA_DIED, Fault, Injected
from tests.faults.chaos.load import Load
from tests.faults.chaos.play import Evidence, LoadRun, Plan, Result, Run
from tests.faults.failpoints.rows import ROWS, Row
from tests.faults.failpoints.sweep import sweep

_TIMES = 20
_ROW_S = 0.55
_PARTS = 3
_SPOTS = ("taken", "run", "ran", "reply", "reply-sent", "replied", "chunk", "chunk-sent", "take", "took", "beat")
"""Points that a replica passes with the calls of this load."""


@dataclass(frozen=True)
class Deaths:
    """Some of the rows, each many times, without other load. In CI each row is a test."""

    name: str
    rows: Sequence[Row]

    @property
    def title(self) -> str:
        """How many there are."""
        return f"death at a named point: {len(self.rows)} rows of the failure table, {_TIMES} times each"

    def length(self, plan: Plan) -> float:
        """Several at a time."""
        return plan.seconds(_TIMES, 0) * len(self.rows) * _ROW_S

    def play(self, plan: Plan) -> Result:
        """Play them in a random order."""
        result = Result(self.name, self.title, plan.seed)
        rows = [*self.rows] * max(1, int(plan.seconds(_TIMES, 1)))
        plan.dice(self.name).shuffle(rows)
        folder = Path(tempfile.mkdtemp(prefix="qs-"))
        server = Server(folder, Setup(persistent=False), {})
        server.start()
        try:
            problems = asyncio.run(sweep(server.url, rows))
        finally:
            server.kill()
            shutil.rmtree(folder, ignore_errors=True)
        result.faults = result.judgement.calls = len(rows)
        for row, problem in zip(rows, problems, strict=True):
            result.judgement.outcomes[row.call, row.error or "ok"] += problem is None
            if problem is not None:
                result.failures.append(f"{row.name}: {problem!r}\n" + "\n".join(getattr(problem, "__notes__", ())))
        return result


def other_deaths(cluster: Cluster, dice: Random, _event: Injected) -> None:
    """One node is started anew, and from then on all of its replicas die at another point, sooner or later."""
    spot, nth = dice.choice(_SPOTS), dice.randint(60, 300)
    cluster.environment.setdefault("node-0", {})["QSERVE_FAILPOINT"] = f"{spot}:{nth}"
    cluster.nodes[0].terminate()
    cluster.nodes[0].wait(60)
    cluster.start_node(0)


def count_deaths(evidence: Evidence) -> None:
    """They did die."""
    said = (evidence.cluster.folder / "node-0.log").read_text()
    deaths = said.count("failpoint ")
    evidence.result.figures["replicas that died at a named point"] = str(deaths)
    if not deaths:
        evidence.fail("nobody died")


RUNS: tuple[Run, ...] = (
    *(Deaths(f"K16-{part + 1}", ROWS[part::_PARTS]) for part in range(_PARTS)),
    LoadRun(
        "K16-load",
        "replicas of one node die at named points, again and again",
        (Fault("other failpoints", other_deaths, REPLICA_DIED),),
        every_s=12,
        seconds=150,
        short_seconds=0,
        load=Load(rate=150),
        throughout=Fault("failpoints", other_deaths, REPLICA_DIED),
        checks=(count_deaths,),
    ),
)
