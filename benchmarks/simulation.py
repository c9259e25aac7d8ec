"""What is full first in a large fleet: `python -m benchmarks.simulation`.

A simulation on a virtual clock. Calls pass through queues of gateways, shards and replicas, each of which takes as much
processor time for a call as was measured for one process on a real machine; nothing else is modelled. The results are
kept in benchmarks/simulation.md, with how far they can be trusted.
"""

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path

from qserve.broker.keys import Keys
from qserve.settings import Settings
from qserve_workers.calls.takeover import look_every_s

RESULTS = Path(__file__).parent / "simulation.md"
_READS_ALL_EVERY_S = 60.0
_SECOND = Settings(beat_interval_s=1.0, dead_after_s=5.0)


@dataclass(frozen=True)
class Costs:
    """Seconds of one core.

    Attributes:
        gateway, shard, replica: For a call that does nothing, on a cluster (benchmarks/cluster.md). Half of what
            gateway and shard take is for the way to the replica, half for the way back.
        link: In a second, on each side, for a process that is connected with a shard and calls nobody.
        beats: In a second, for a shard, for each replica in it.
        neighbour: In a second, for a shard, for each replica of a deployment that another one of it looks at.
        meta: For the home, to read what it knows of one deployment.
    """

    gateway: float = 73e-6
    shard: float = 60e-6
    replica: float = 85e-6
    link: float = 0.2e-3
    beats: float = 0.5e-3
    neighbour: float = 0.11e-6
    meta: float = 2.3e-6


@dataclass(frozen=True)
class Fleet:
    """How many there are of each.

    Attributes:
        work_s: What user code takes for a call, on average.
        skew: How unequally deployments are called: 0, all alike; 1, the n-th a n-th as often as the first (Zipf).
            Replicas are divided among them in the same way.
    """

    gateways: int = 200
    shards: int = 64
    deployments: int = 1000
    replicas: int = 1000
    nodes: int = 100
    work_s: float = 0.0
    skew: float = 0.0
    costs: Costs = Costs()

    @cached_property
    def shares(self) -> list[float]:
        """Of each deployment in all calls."""
        weights = [1 / (place + 1) ** self.skew for place in range(self.deployments)]
        return [weight / sum(weights) for weight in weights]

    @cached_property
    def places(self) -> list[int]:
        """The shard of each deployment, numbered from 0."""
        keys = Keys("default", self.shards)
        return [max(0, keys.of(f"deployment{number}").shard - 1) for number in range(self.deployments)]

    @cached_property
    def replicas_of(self) -> list[int]:
        """How many replicas each deployment has."""
        return [max(1, round(share * self.replicas)) for share in self.shares]

    @cached_property
    def shares_of_shards(self) -> list[float]:
        """Of each shard in all calls."""
        found = [0.0] * self.shards
        for share, place in zip(self.shares, self.places, strict=True):
            found[place] += share
        return found

    def idle(self) -> dict[str, float]:
        """The part of a core that the busiest of each takes while nobody calls."""
        costs, in_shards = self.costs, Counter(self.places)
        beats: Counter[int] = Counter()
        looks: dict[int, float] = defaultdict(float)
        for place, replicas in zip(self.places, self.replicas_of, strict=True):
            beats[place] += replicas
            looks[place] += replicas**2 / look_every_s(replicas, _SECOND)
        busiest = max(beats[place] * costs.beats + looks[place] * costs.neighbour for place in in_shards)
        home = (self.gateways + self.nodes) * costs.link
        return {
            "gateway": self.shards * costs.link,
            "shard": busiest + self.gateways * costs.link,
            "replica": costs.beats,
            "home": home + self.nodes * self.deployments * costs.meta / _READS_ALL_EVERY_S,
        }

    def limits(self) -> dict[str, float]:
        """How many calls a second in all fill the busiest of each: plain arithmetic."""
        costs, idle = self.costs, self.idle()
        pairs = zip(self.replicas_of, self.shares, strict=True)
        return {
            "gateway": (1 - idle["gateway"]) * self.gateways / costs.gateway,
            "shard": (1 - idle["shard"]) / (costs.shard * max(self.shares_of_shards)),
            "replica": (1 - idle["replica"])
            * min(replicas / (share * (costs.replica + self.work_s)) for replicas, share in pairs),
        }


@dataclass(frozen=True)
class Outcome:
    """What was seen in a simulated time.

    Attributes:
        latencies: Seconds from arrival to response, in order.
        busy: The part of the time in which the busiest of each worked.
    """

    latencies: list[float]
    busy: dict[str, float]

    def percentile(self, part: float) -> float:
        """The latency that so large a part of the calls did not exceed."""
        return self.latencies[min(len(self.latencies) - 1, int(len(self.latencies) * part))]


class _Servers:
    """Machines of one kind, each of which does one thing at a time, first come, first served."""

    def __init__(self, number: int, idle: float) -> None:
        self.free_at = [0.0] * number
        self.worked = [0.0] * number
        self._slower = 1 / (1 - idle)

    def serve(self, which: int, now: float, cost: float) -> float:
        """When that is done."""
        cost *= self._slower
        done = max(now, self.free_at[which]) + cost
        self.free_at[which] = done
        self.worked[which] += cost
        return done


def simulate(fleet: Fleet, rate: float, seconds: float, seed: int = 1) -> Outcome:
    """Let calls arrive at random moments, so many a second."""
    chance, costs, idle = random.Random(seed), fleet.costs, fleet.idle()
    gateways, shards = _Servers(fleet.gateways, idle["gateway"]), _Servers(fleet.shards, idle["shard"])
    free = [[0.0] * replicas for replicas in fleet.replicas_of]
    worked = [0.0] * fleet.deployments
    latencies, number = [], count()
    # (when, number of the event, step, when the call came, its gateway, its deployment)
    events = [(when, next(number), 0, when, *where) for when, where in _arrivals(fleet, rate, seconds, chance)]
    heapq.heapify(events)
    while events:
        now, _, step, came, gateway, deployment = heapq.heappop(events)
        if step in (0, 4):
            done = gateways.serve(gateway, now, costs.gateway / 2)
        elif step in (1, 3):
            done = shards.serve(fleet.places[deployment], now, costs.shard / 2)
        else:
            work = costs.replica + (chance.expovariate(1 / fleet.work_s) if fleet.work_s else 0.0)
            done = max(now, heapq.heappop(free[deployment])) + work
            heapq.heappush(free[deployment], done)
            worked[deployment] += work
        if step == 4:
            latencies.append(done - came)
        else:
            heapq.heappush(events, (done, next(number), step + 1, came, gateway, deployment))
    pairs = zip(worked, fleet.replicas_of, strict=True)
    busy = {
        "gateway": max(gateways.worked) / seconds,
        "shard": max(shards.worked) / seconds,
        "replica": max(each / replicas for each, replicas in pairs) / seconds,
    }
    return Outcome(sorted(latencies), busy)


def _arrivals(
    fleet: Fleet, rate: float, seconds: float, chance: random.Random
) -> Iterator[tuple[float, tuple[int, int]]]:
    moments, now = [], chance.expovariate(rate)
    while now < seconds:
        moments.append(now)
        now += chance.expovariate(rate)
    deployments = chance.choices(range(fleet.deployments), fleet.shares, k=len(moments))
    for moment, deployment in zip(moments, deployments, strict=True):
        yield moment, (chance.randrange(fleet.gateways), deployment)


FLEETS = {
    "nothing to do in a call, 1,000 deployments called alike": Fleet(),
    "the same, called as in Zipf's law": Fleet(skew=1.0),
    "10 deployments with 100 replicas each": Fleet(deployments=10),
    "one deployment with 1,000 replicas": Fleet(deployments=1),
    "10 ms of work in a call, 1,000 deployments called alike": Fleet(work_s=0.01),
    "10 ms of work, called as in Zipf's law": Fleet(work_s=0.01, skew=1.0),
}
_CALLS = 60_000


def rows() -> Iterator[str]:
    """The table of results."""
    yield "| fleet | gateways | hottest shard | replicas | first | p50 at 50 % | p99 at 50 % | p99 at 90 % |"
    yield "|---|---:|---:|---:|---|---:|---:|---:|"
    for name, fleet in FLEETS.items():
        limits = fleet.limits()
        first = min(limits, key=lambda each: limits[each])
        half, near = (simulate(fleet, part * limits[first], _CALLS / limits[first]) for part in (0.5, 0.9))
        figures = [f"{limits[each]:,.0f}/s" for each in ("gateway", "shard", "replica")]
        times = [f"{1000 * it.percentile(part):.2f} ms" for it, part in ((half, 0.5), (half, 0.99), (near, 0.99))]
        yield f"| {' | '.join([name, *figures, first, *times])} |"


def idle_rows() -> Iterator[str]:
    """How much of a core is taken while nobody calls, and how that grows."""
    yield "| fleet | a gateway | the busiest shard | the home |"
    yield "|---|---:|---:|---:|"
    half = Fleet(gateways=100, replicas=500, deployments=500, nodes=50)
    one = replace(half, deployments=1)
    fleets = {
        "500 deployments, 500 replicas, 100 gateways": half,
        "1,000 of each, 200 gateways": Fleet(),
        "one deployment, 500 replicas, 100 gateways": one,
        "one deployment, 1,000 replicas, 200 gateways": Fleet(deployments=1),
    }
    for name, fleet in fleets.items():
        idle = fleet.idle()
        figures = (f"{100 * idle[part]:.1f} %" for part in ("gateway", "shard", "home"))
        yield f"| {' | '.join([name, *figures])} |"


def main() -> None:
    """Print the tables and put them into the file of results, in place of those that stand there."""
    tables = ["\n".join(rows()), "\n".join(idle_rows())]
    print("\n\n".join(tables))
    head, *parts = RESULTS.read_text().split("<!-- table -->\n")
    kept = [part.partition("<!-- end -->")[2] for part in parts]
    both = zip(tables, kept, strict=True)
    RESULTS.write_text(head + "".join(f"<!-- table -->\n{table}\n<!-- end -->{rest}" for table, rest in both))


if __name__ == "__main__":
    main()
