"""Runs in which versions change under load, and in which many deploy at once."""

import itertools
import threading
import time
from dataclasses import dataclass, field
from random import Random

from qserve.deployments import deploying
from qserve.deployments.driver import ConnectedInstance
from qserve.settings import Settings
from tests.faults.chaos import app, ledger
from tests.faults.chaos.cluster import Cluster, Setup
from tests.faults.chaos.faults import Fault, Injected
from tests.faults.chaos.ledger import Call
from tests.faults.chaos.load import Load
from tests.faults.chaos.play import Evidence, LoadRun, Plan, Result, Run, calling
from tests.faults.chaos.verdicts import judge
from tests.support.waiting import joined

_GOOD, _BAD = "good", "bad"
_WAIT_S = 90.0


class Rollouts:
    """Deploys one version after the other; the constructor of every fifth raises."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def __call__(self, cluster: Cluster, dice: Random, _event: Injected) -> None:
        number = next(self._numbers)
        broken = number % 5 == 3
        version = f"{_BAD if broken else _GOOD}{number}"
        goal = cluster.put(dice.choice(["Safe", "Once"]), version, broken=broken)
        try:
            assert goal.wait(_WAIT_S), f"version {version} was not reached in {_WAIT_S} s\n{cluster.logs()}"
        except RuntimeError:
            if not broken:
                raise
        else:
            assert not broken, f"version {version} cannot be constructed and was reached"


def no_bad_version_served(evidence: Evidence) -> None:
    """A version that cannot be constructed never gets a call; at the end all calls are run by the newest good one."""
    runs = [(call, run) for call in evidence.calls.values() for run in call.runs]
    if served := [run.version for _, run in runs if run.version.startswith(_BAD)]:
        evidence.fail(f"calls were run by {sorted(set(served))}")
    used = {run.version for _, run in runs}
    evidence.result.figures["versions that ran calls"] = str(len(used))
    for name, deployed in evidence.cluster.state.list().items():
        over = max(event.ended for event in evidence.injected)
        found = {run.version for call, run in runs if _name(call) == name and run.at > over}
        if not found <= {deployed.spec.version}:
            evidence.fail(f"{name} is at {deployed.spec.version}, and {found} run its calls")


def _name(call: Call) -> str:
    return "Safe" if call.nature == "safe" else "Once"


@dataclass(frozen=True)
class RacingDeploys:
    """Several clients deploy different specs of one name at once, round after round, beside a light load."""

    name: str = "K14"
    title: str = "50 racing deploys of one name from 4 clients"
    rounds: int = 20
    clients: int = 4
    deploys: int = 50
    round_s: float = 2.5
    load: Load = field(default_factory=lambda: Load(rate=60, processes=1, durations=((1, 0.02),)))

    def length(self, plan: Plan) -> float:
        """A few seconds for each round."""
        return plan.seconds(self.rounds * self.round_s + 20, 20)

    def play(self, plan: Plan) -> Result:
        """Race, wait for the winner, and look whether what serves is one of the specs, whole."""
        dice, result = plan.dice(self.name), Result(self.name, self.title, plan.seed)
        rounds = max(1, int(plan.seconds(self.rounds, 1)))
        with plan.stage.cluster(Setup(replicas=1), None) as cluster:
            with calling(cluster, self.load, rounds * self.round_s, dice, self.name):
                began = time.monotonic()
                for number in range(rounds):
                    self._round(cluster, number, result)
                result.figures["time for a round"] = f"{(time.monotonic() - began) / rounds:.1f} s"
            calls, _ = ledger.read(cluster.ledgers, f"{self.name}-*")
            result.judgement = judge(calls.values(), [])
        return result

    def _round(self, cluster: Cluster, number: int, result: Result) -> None:
        won: list[tuple[int, str, int]] = []
        goals: dict[int, deploying.Goal] = {}

        def race(client: int) -> None:
            instance, last = ConnectedInstance(Settings()), 0
            for turn in range(self.deploys // self.clients):
                version, most = f"r{number}-{client}-{turn}", 100 + client * 100 + turn
                wanted = app.Safe.options(version=version, max_concurrent_queries=most)
                goal = instance.put(wanted.to_spec(instance.codec, init_kwargs={"version": version}))
                if goal.deployed.generation <= last:
                    result.failures.append(f"generation {goal.deployed.generation} came after {last}")
                last = goal.deployed.generation
                won.append((last, version, most))
                goals[last] = goal
            instance.state.close()

        threads = [threading.Thread(target=race, args=(client,)) for client in range(self.clients)]
        for thread in threads:
            thread.start()
        joined(*threads)
        result.faults += len(won)
        won.sort()
        if len(goals) != len(won):
            result.failures.append(f"{len(won)} deploys made {len(goals)} generations")
        generation, version, most = won[-1]
        if not deploying.Goal(cluster.state, goals[generation].deployed, None).wait(_WAIT_S):
            result.failures.append(f"generation {generation} was not reached in {_WAIT_S} s\n{cluster.logs()}")
        self._check_winner(cluster, (generation, version, most), result)

    @staticmethod
    def _check_winner(cluster: Cluster, winner: tuple[int, str, int], result: Result) -> None:
        deployed = cluster.state.get("Safe")
        assert deployed is not None
        spec = deployed.spec
        _, arguments = cluster.instance.codec.unpack_call(spec.init_args)
        found = (deployed.generation, spec.version, spec.max_concurrent_queries, arguments)
        if found != (*winner, {"version": winner[1]}):
            result.failures.append(f"deployed is {found}, deployed last was {winner}")
        serving = cluster.state.observed.replicas("Safe").values()
        if strangers := {info.tag for info in serving if info.revision != spec.revision}:
            result.failures.append(f"other revisions than the one deployed last still serve: {strangers}")


RUNS: tuple[Run, ...] = (
    LoadRun(
        "K13",
        "a new version every few seconds; the constructor of every fifth raises",
        (Fault("a rollout", Rollouts()),),
        every_s=8,
        seconds=150,
        short_seconds=9,
        short_every_s=2,
        checks=(no_bad_version_served,),
    ),
    RacingDeploys(),
)
