"""What qserve does when it is asked for more than it can do: `python -m benchmarks.overload [SECONDS PER STEP]`.

Two gateways and a process with handles call deployments of known capacity at rates that do not wait for answers
(benchmarks/openloop.py), from half the capacity to five times as much, while the length of the queue is sampled. A full
run, of 60 s per step, is kept in benchmarks/overload.md.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import redis

from benchmarks import processes, slots
from benchmarks.bench import machine
from benchmarks.openloop import Generator, Phase, Plan, Request
from benchmarks.steps import Step, Verdict, ended, table
from qserve.settings import Settings
from qserve.spec import ReplicaInfo
from qserve.testing import instance

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
_WARM_UP_S = 2.0
_SAMPLE_S = 0.002


@dataclass
class Stage:
    """A running instance with two gateways.

    Attributes:
        accepted: Deployment -> calls answered with a result so far, by whatever way they came.
    """

    gateways: list[str]
    settings: Settings
    accepted: dict[str, int] = field(default_factory=dict)
    seed: int = 0

    def plan(self, deployment: str, phases: list[Phase], start: float, **options: int) -> Plan:
        self.seed += 1
        targets = [f"{gateway}/{deployment}" for gateway in self.gateways]
        return Plan(targets, start, phases, seed=self.seed, **options)

    def capacity(self, deployment: str, seconds: float) -> float:
        """Calls per second when more are sent only as others are answered."""
        start = time.monotonic() + _WARM_UP_S
        phases = [Phase(0, seconds + 1)]
        seen = self.run(deployment, [self.plan(deployment, phases, start, closed=_CLOSED)])
        return ended(seen, start + 1, start + 1 + seconds) / seconds

    def load(self, deployment: str, rates: list[Phase], start: float, **options: int) -> list[Plan]:
        """Plans for HTTP and handles together."""
        over_http = [Phase(phase.rate * (1 - _HANDLE_SHARE), phase.seconds) for phase in rates]
        by_handle = [Phase(phase.rate * _HANDLE_SHARE, phase.seconds) for phase in rates]
        self.seed += 1
        handle = Plan([deployment], start, by_handle, seed=self.seed)
        return [self.plan(deployment, over_http, start, **options), handle]

    def run(self, deployment: str, plans: list[Plan]) -> list[Request]:
        """Carry plans out and remember what was answered."""
        return self.finish(deployment, self.start(plans))

    @staticmethod
    def start(plans: list[Plan]) -> list[Generator]:
        return [Generator(plan, os.environ["QSERVE_RUNTIME_DIR"]) for plan in plans]

    def finish(self, deployment: str, generators: list[Generator]) -> list[Request]:
        seen = [request for generator in generators for request in generator.result()]
        answered = sum(request.status == 200 for request in seen)
        self.accepted[deployment] = self.accepted.get(deployment, 0) + answered
        return sorted(seen, key=lambda request: request.due)

    @contextlib.contextmanager
    def depths(self, deployment: str) -> Iterator[list[tuple[float, int]]]:
        """Samples of (when, length of the queue), taken until the end of the block."""
        samples: list[tuple[float, int]] = []
        over = threading.Event()
        stream = self.settings.keys.calls(deployment)

        def sample() -> None:
            with redis.Redis.from_url(self.settings.redis_url, protocol=2) as client:
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
        """How many calls the queue still holds, and how many more or fewer ran than callers had answers of."""
        keys = self.settings.keys
        with redis.Redis.from_url(self.settings.redis_url, protocol=2) as client:
            end = time.monotonic() + 5
            while True:  # replicas say once a second how many they have run
                infos: list[bytes] = client.hvals(keys.replicas(deployment))
                ran = sum(msgspec.msgpack.decode(info, type=ReplicaInfo).handled for info in infos)
                surplus = ran - self.accepted.get(deployment, 0)
                if not surplus or time.monotonic() > end:
                    return client.xlen(keys.calls(deployment)), surplus
                time.sleep(0.1)


@contextlib.contextmanager
def stage() -> Iterator[Stage]:
    """An instance of its own, with a second gateway."""
    with instance({"port": 0}) as running, second_gateway() as url:
        for deployment in DEPLOYMENTS:
            deployment.deploy()
        yield Stage([running.url, url], running.settings)


@contextlib.contextmanager
def second_gateway() -> Iterator[str]:
    """Another gateway of the running instance; its URL."""
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
    """The steps of LOADS, back to back."""
    capacity = on.capacity(FLOODED, seconds)
    start = time.monotonic() + _WARM_UP_S
    plans = on.load(FLOODED, [Phase(load * capacity, seconds) for load in LOADS], start)
    with on.depths(FLOODED) as depths:
        seen = on.run(FLOODED, plans)
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
    yield Verdict.at_most("longest queue seen", max(depth for _, depth in depths), slots.BOUND, "calls")
    patience = min(5.0, seconds / 2)
    later = Step.of("later", seen, start + 5 * seconds + patience, seconds - patience, depths, capacity, settle=0)
    yield Verdict.at_most(f"p99 {patience:g} s after 5 C, at {again.name}", later.p99_ms, 1.3 * half.p99_ms, "ms")


def exact(on: Stage, deployment: str, seen: list[Request]) -> Iterator[Verdict]:
    """What has to hold whatever the machine: every request has the one outcome that it should have."""
    refused = [request for request in seen if request.status == 503]
    queued, surplus = on.left_over(deployment)
    unpaced = sum(not request.retry_after for request in refused)
    yield Verdict.none("answers but 200 and 503", sum(request.status not in (200, 503) for request in seen), len(seen))
    yield Verdict.none("refusals without Retry-After", unpaced, len(refused))
    yield Verdict.none("answers to another request", sum(request.swapped for request in seen), len(seen))
    yield Verdict.none("calls left in the queue", queued, len(seen))
    yield Verdict.none("calls run, but not answered, or the reverse", abs(surplus), len(seen))


def neighbours(on: Stage, seconds: float) -> Iterator[Step | Verdict]:
    """Half the capacity of one deployment, alone and while another one gets five times of what it can do."""
    capacity = on.capacity(NEIGHBOUR, min(seconds, 5))
    start = time.monotonic() + _WARM_UP_S
    calm = on.load(NEIGHBOUR, [Phase(0.5 * capacity, 2 * seconds)], start)
    flood = on.load(FLOODED, [Phase(5 * capacity, seconds)], start + seconds)
    with on.depths(NEIGHBOUR) as depths:
        generators = on.start(flood)
        seen = on.run(NEIGHBOUR, calm)
        flooded = on.finish(FLOODED, generators)
    alone = Step.of("0.5 C, alone", seen, start, seconds, depths, capacity)
    beside = Step.of("0.5 C, another at 5 C", seen, start + seconds, seconds, depths, capacity)
    yield from (alone, beside)
    yield Verdict.at_most("p99 beside a flood on another deployment", beside.p99_ms / alone.p99_ms, 1.3, "x")
    yield Verdict.none("calls refused beside a flood", beside.refused, beside.sent)
    yield from exact(on, FLOODED, flooded)


def slow_clients(on: Stage, seconds: float) -> Iterator[Step | Verdict]:
    """Half the capacity, then the same beside connections that send a byte now and then."""
    capacity = on.capacity(NEIGHBOUR, min(seconds, 5))
    steps = []
    for name, trickling in (("0.5 C", 0), (f"0.5 C, {SLOW_CLIENTS} slow clients", SLOW_CLIENTS)):
        start = time.monotonic() + _WARM_UP_S
        plans = on.load(NEIGHBOUR, [Phase(0.5 * capacity, seconds)], start)
        trickle = on.plan(NEIGHBOUR, [Phase(0, seconds)], start, trickling=trickling)
        with on.depths(NEIGHBOUR) as depths:
            seen = on.run(NEIGHBOUR, [*plans, trickle])
        steps.append(Step.of(name, seen, start, seconds, depths, capacity))
    yield from steps
    yield Verdict.at_most("p99 beside slow clients", steps[1].p99_ms / steps[0].p99_ms, 1.3, "x")


def processor(on: Stage, seconds: float) -> Iterator[Step | Verdict]:
    """The same where the processor is the limit, which calls, gateways and load generators share here."""
    capacity = on.capacity(BURNING, min(seconds, 10))
    start = time.monotonic() + _WARM_UP_S
    loads = (0.5, 2.0, 5.0)
    plans = on.load(BURNING, [Phase(load * capacity, seconds) for load in loads], start)
    with on.depths(BURNING) as depths:
        seen = on.run(BURNING, plans)
    for index, load in enumerate(loads):
        yield Step.of(f"{load:g} C, bound by the processor", seen, start + index * seconds, seconds, depths, capacity)
    yield from exact(on, BURNING, seen)


PARTS: dict[str, Callable[[Stage, float], Iterator[Step | Verdict]]] = {
    "overload": overload,
    "neighbours": neighbours,
    "slow": slow_clients,
    "processor": processor,
}


def main(seconds_per_step: float = FULL_S, parts: list[str] | None = None) -> tuple[str, list[Verdict]]:
    """Measure; returns the whole of overload.md and what was demanded."""
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
    return table(about, rows), [row for row in rows if isinstance(row, Verdict)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", nargs="?", type=float, default=FULL_S, help="per step")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this; may be given again")
    arguments = parser.parse_args()
    text, verdicts = main(arguments.seconds, arguments.part)
    print(text)
    if arguments.seconds >= FULL_S and not arguments.part:
        RESULTS.write_text(text)
    sys.exit(1 if any(not verdict.passed for verdict in verdicts) else 0)
