"""What qserve does when it is asked for more than it can do: `python -m benchmarks.overload [SECONDS PER STEP]`.

Two gateways and a process with handles call deployments of known capacity at rates that do not wait for answers
(benchmarks/openloop.py), from half the capacity to five times as much, while the length of the queue is sampled. A full
run, of 60 s per step, is kept in benchmarks/overload.md.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from benchmarks import processes, slots
from benchmarks.openloop import Generator, Phase, Plan, Request
from benchmarks.rows import machine
from benchmarks.steps import Step, Verdict, ended, table
from qserve.broker.server import redis_clients
from qserve.settings import Settings
from qserve.testing import instance
from qserve.wire.spec import ReplicaInfo

RESULTS = Path(__file__).parent / "overload.md"
FULL_S = 60.0
LOADS = (0.5, 0.9, 1.2, 2.0, 5.0, 0.5)
"""Rates of the steps, in capacities; the last one shows how long the overload before it is felt."""
SLOW_CLIENTS = 500
DEPLOYMENTS = (slots.Flooded, slots.Neighbour, slots.Burning)
FLOODED, NEIGHBOUR, BURNING = (deployment.name for deployment in DEPLOYMENTS)
_CLOSED = 40
"""Connections by which capacity is measured: enough for every place, too few to fill the queue."""
_HANDLE_SHARE = 0.2
_SAMPLE_S = 0.002


@dataclass
class Stage:
    """A running instance with two gateways.

    Attributes:
        accepted: For each deployment, how many calls by HTTP and by handles have been answered with a result.
    """

    gateways: list[str]
    settings: Settings
    accepted: Counter[str] = field(default_factory=Counter)
    seed: int = 0

    def plan(self, deployment: str, phases: list[Phase], **options: int) -> Plan:
        """A plan for HTTP requests, which go to every gateway in turn."""
        self.seed += 1
        return Plan([f"{gateway}/{deployment}" for gateway in self.gateways], phases, seed=self.seed, **options)

    def load(self, deployment: str, phases: list[Phase]) -> list[Plan]:
        """Plans for HTTP and handles together."""
        over_http = [Phase(phase.rate * (1 - _HANDLE_SHARE), phase.seconds) for phase in phases]
        by_handle = [Phase(phase.rate * _HANDLE_SHARE, phase.seconds) for phase in phases]
        self.seed += 1
        return [self.plan(deployment, over_http), Plan([deployment], by_handle, seed=self.seed)]

    def capacity(self, deployment: str, seconds: float) -> float:
        """Calls per second, when a call is sent only after another one was answered."""
        plan = self.plan(deployment, [Phase(0, seconds + 1)], closed=_CLOSED)
        seen, start = self.run({deployment: [plan]})
        return ended(seen[deployment], start + 1, start + 1 + seconds) / seconds

    def run(self, plans: dict[str, list[Plan]]) -> tuple[dict[str, list[Request]], float]:
        """Carry out plans for deployments, all at the same time.

        Returns:
            What became of the requests of each deployment, in the order of their due times; and when the plans began.
        """
        folder = os.environ["QSERVE_RUNTIME_DIR"]
        running = {deployment: [Generator(plan, folder) for plan in each] for deployment, each in plans.items()}
        for generator in itertools.chain.from_iterable(running.values()):
            generator.wait_until_ready()
        start = time.monotonic() + 0.2
        for generator in itertools.chain.from_iterable(running.values()):
            generator.begin(start)
        seen: dict[str, list[Request]] = {}
        for deployment, generators in running.items():
            found = [request for generator in generators for request in generator.result()]
            seen[deployment] = sorted(found, key=lambda request: request.due)
            self.accepted[deployment] += sum(request.status == 200 for request in found)
        return seen, start

    @contextlib.contextmanager
    def depths(self, deployment: str) -> Iterator[list[tuple[float, int]]]:
        """Take samples of the length of the queue, each with its time, until the end of the block."""
        samples: list[tuple[float, int]] = []
        over = threading.Event()
        stream = self.settings.keys.calls(deployment)

        def sample() -> None:
            with redis_clients.client(self.settings.redis_url, 5.0) as client:
                while not over.wait(_SAMPLE_S):
                    samples.append((time.monotonic(), client.xlen(stream)))

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield samples
        finally:
            over.set()
            thread.join()

    def left_over(self, deployment: str) -> tuple[int, int]:
        """How many calls the queue still holds, and how many more or fewer ran than callers had answers to."""
        keys = self.settings.keys
        with redis_clients.client(self.settings.redis_url, 5.0) as client:
            end = time.monotonic() + 5
            while True:  # replicas say once a second how many they have run
                infos: list[bytes] = client.hvals(keys.replicas(deployment))
                ran = sum(msgspec.msgpack.decode(info, type=ReplicaInfo).handled for info in infos)
                surplus = ran - self.accepted[deployment]
                if not surplus or time.monotonic() > end:
                    return client.xlen(keys.calls(deployment)), surplus
                time.sleep(0.1)


@contextlib.contextmanager
def stage() -> Iterator[Stage]:
    """Run an instance with a second gateway."""
    with instance({"port": 0}) as running, second_gateway() as url:
        for deployment in DEPLOYMENTS:
            deployment.deploy()
        yield Stage([running.url, url], running.settings)


@contextlib.contextmanager
def second_gateway() -> Iterator[str]:
    """Run another gateway of the instance, and yield its URL."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "qserve_gateway", "--port", "0", "--ready-file", f"/dev/fd/{writing}"],
        env=processes.environment(os.environ["QSERVE_RUNTIME_DIR"]),
        pass_fds=(writing,),
    )
    os.close(writing)
    try:
        with os.fdopen(reading) as pipe:
            yield json.loads(pipe.readline())["url"]
    finally:
        process.terminate()
        process.wait()


# The parts


def overload(on: Stage, seconds: float) -> Iterator[Step | Verdict]:
    """Measure the steps of LOADS, one after the other without a pause."""
    capacity = on.capacity(FLOODED, seconds)
    plans = on.load(FLOODED, [Phase(load * capacity, seconds) for load in LOADS])
    with on.depths(FLOODED) as depths:
        found, start = on.run({FLOODED: plans})
    seen = found[FLOODED]
    steps = [
        Step.of(f"{load:g} C", seen, start + index * seconds, seconds, depths, capacity)
        for index, load in enumerate(LOADS)
    ]
    yield from steps
    half, two, five, again = steps[0], steps[3], steps[4], steps[5]
    for step in (two, five):
        yield Verdict.at_least(f"goodput at {step.name}", step.goodput / capacity, 0.95, "C")
    longest_ms = slots.BOUND / capacity * 1000 + 1.2 * half.p99_ms
    for step in (two, five):
        yield Verdict.at_most(f"p99 of what was accepted at {step.name}", step.p99_ms, longest_ms, "ms")
        yield Verdict.at_most(f"p99 of refusals at {step.name}", step.refusal_p99_ms, 50, "ms")
    yield from exact(on, FLOODED, seen)
    over = sum(depth > slots.BOUND for _, depth in depths)
    yield Verdict.none(f"samples of a queue longer than {slots.BOUND}", over, len(depths))
    patience = min(5.0, seconds / 2)
    later = Step.of("later", seen, start + 5 * seconds + patience, seconds - patience, depths, capacity, settle=0)
    yield Verdict.at_most(f"p99 {patience:g} s after 5 C, at {again.name}", later.p99_ms, 1.3 * half.p99_ms, "ms")


def exact(on: Stage, deployment: str, seen: list[Request]) -> Iterator[Verdict]:
    """The verdicts that hold on every machine: each request has exactly the outcome that it should have."""
    refused = [request for request in seen if request.status == 503]
    queued, surplus = on.left_over(deployment)
    unpaced = sum(not request.retry_after for request in refused)
    yield Verdict.none("answers but 200 and 503", sum(request.status not in (200, 503) for request in seen), len(seen))
    yield Verdict.none("refusals without Retry-After", unpaced, len(refused))
    yield Verdict.none("answers to another request", sum(request.swapped for request in seen), len(seen))
    yield Verdict.none("calls left in the queue", queued, len(seen))
    yield Verdict.none("calls run, but not answered, or the reverse", abs(surplus), len(seen))


def neighbours(on: Stage, seconds: float) -> Iterator[Step | Verdict]:
    """Measure one deployment at half its capacity, alone and while another one gets five times its capacity."""
    capacity = on.capacity(NEIGHBOUR, min(seconds, 5))
    calm = on.load(NEIGHBOUR, [Phase(0.5 * capacity, 2 * seconds)])
    flood = on.load(FLOODED, [Phase(0, seconds), Phase(5 * capacity, seconds)])
    with on.depths(NEIGHBOUR) as depths:
        seen, start = on.run({NEIGHBOUR: calm, FLOODED: flood})
    alone = Step.of("0.5 C, alone", seen[NEIGHBOUR], start, seconds, depths, capacity)
    beside = Step.of("0.5 C, another at 5 C", seen[NEIGHBOUR], start + seconds, seconds, depths, capacity)
    yield from (alone, beside)
    yield Verdict.at_most("p99 beside a flood on another deployment", beside.p99_ms / alone.p99_ms, 1.3, "x")
    yield Verdict.none("calls refused beside a flood", beside.refused, beside.sent)
    yield from exact(on, FLOODED, seen[FLOODED])
    yield from exact(on, NEIGHBOUR, seen[NEIGHBOUR])


def slow_clients(on: Stage, seconds: float) -> Iterator[Step | Verdict]:
    """Measure half the capacity, and the same beside connections that send a byte now and then."""
    capacity = on.capacity(NEIGHBOUR, min(seconds, 5))
    steps = []
    for name, trickling in (("0.5 C, all clients quick", 0), (f"0.5 C, {SLOW_CLIENTS} slow clients", SLOW_CLIENTS)):
        plans = on.load(NEIGHBOUR, [Phase(0.5 * capacity, seconds)])
        trickle = on.plan(NEIGHBOUR, [Phase(0, seconds)], trickling=trickling)
        with on.depths(NEIGHBOUR) as depths:
            seen, start = on.run({NEIGHBOUR: [*plans, trickle]})
        steps.append(Step.of(name, seen[NEIGHBOUR], start, seconds, depths, capacity))
    yield from steps
    yield Verdict.at_most("p99 beside slow clients", steps[1].p99_ms / steps[0].p99_ms, 1.3, "x")
    yield from exact(on, NEIGHBOUR, seen[NEIGHBOUR])


def processor(on: Stage, seconds: float) -> Iterator[Step | Verdict]:
    """Measure a deployment whose limit is the processor, which calls, gateways and load generators share."""
    capacity = on.capacity(BURNING, min(seconds, 10))
    loads = (0.5, 2.0, 5.0)
    plans = on.load(BURNING, [Phase(load * capacity, seconds) for load in loads])
    with on.depths(BURNING) as depths:
        seen, start = on.run({BURNING: plans})
    for index, load in enumerate(loads):
        name = f"{load:g} C, bound by the processor"
        yield Step.of(name, seen[BURNING], start + index * seconds, seconds, depths, capacity)
    yield from exact(on, BURNING, seen[BURNING])


PARTS: dict[str, Callable[[Stage, float], Iterator[Step | Verdict]]] = {
    "overload": overload,
    "neighbours": neighbours,
    "slow": slow_clients,
    "processor": processor,
}


def main(seconds_per_step: float = FULL_S, parts: list[str] | None = None) -> tuple[str, bool]:
    """Measure all parts, or some.

    Returns:
        The text of overload.md, and whether all demands were met. Counts are demanded always, times only of a full run,
        which should have a machine of its own.
    """
    busy = os.getloadavg()[0]
    rows: list[Step | Verdict] = []
    with stage() as on:
        for part in parts or list(PARTS):
            for row in PARTS[part](on, seconds_per_step):
                rows.append(row)
                print(row, flush=True)
    about = [
        f"{machine()}, Python {platform.python_version()}; load average before the run: {busy:.1f}.",
        f"Command: `python -m benchmarks.overload {seconds_per_step:g}`, {seconds_per_step:g} s per step.",
    ]
    demanded = [row for row in rows if isinstance(row, Verdict) and (row.is_exact or seconds_per_step >= FULL_S)]
    return table(about, rows), all(row.passed for row in demanded)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", nargs="?", type=float, default=FULL_S, help="per step")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this; may be given again")
    arguments = parser.parse_args()
    text, passed = main(arguments.seconds, arguments.part)
    print(text)
    if arguments.seconds >= FULL_S and not arguments.part:
        RESULTS.write_text(text)
    sys.exit(0 if passed else 1)
