"""The long run: nothing grows that should not, and everything is back to what it was when the load is over."""

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

from qserve.broker.keys import GROUP
from tests.faults.chaos.checks import takeover
from tests.faults.chaos.cluster import Cluster, Server
from tests.faults.chaos.ledger import OK
from tests.faults.chaos.play import Evidence, LoadRun, Result, Run, came_true
from tests.faults.chaos.runs.replicas import KILL

_EVERY_S = 2.0
_MIB = 1 << 20
_GROWTH_MIB = 3.0
"""Between the second and the last quarter of the run: what an allocator takes, and not what a leak costs."""
_SERVER_MIB = 1.5
_CLEAN_S = 75.0


@dataclass(frozen=True)
class Sample:
    """One process at one time."""

    rss: int
    descriptors: int


@contextmanager
def measured(cluster: Cluster, result: Result) -> Iterator[None]:
    """Memory and descriptors of every process that lives from beginning to end."""
    samples: dict[psutil.Process, list[Sample]] = {process: [] for process in cluster.processes()}
    assert isinstance(cluster.server, Server)
    samples[psutil.Process(cluster.server.process.pid)] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(_EVERY_S):
            for process, its in samples.items():
                with suppress(psutil.Error):
                    its.append(Sample(process.memory_info().rss, process.num_fds()))

    names = {process: _name(process) for process in samples}
    used = int(cluster.redis.info("memory")["used_memory"])
    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    result.figures["memory of the server before"] = f"{used / _MIB:.2f} MiB"
    _judge({names[process]: its for process, its in samples.items() if process.is_running()}, result)


def _name(process: psutil.Process) -> str:
    words = [word for word in process.cmdline() if not word.startswith("/")]
    return f"{' '.join(words[:4])[:40]} ({process.pid})"


def _judge(samples: dict[str, list[Sample]], result: Result) -> None:
    growth, descriptors = {}, {}
    for name, its in samples.items():
        quarter = len(its) // 4
        if not quarter:
            continue
        early, late = its[quarter : 2 * quarter], its[-quarter:]
        growth[name] = (_rss(late) - _rss(early)) / _MIB
        descriptors[name] = _open(late) - _open(early)
    if not growth:
        return
    worst = max(growth, key=lambda name: growth[name])
    result.figures["most memory gained from the second to the last quarter"] = f"{growth[worst]:.2f} MiB, {worst}"
    result.failures += [f"{name} grew by {mib:.1f} MiB" for name, mib in growth.items() if mib > _GROWTH_MIB]
    result.failures += [f"{name} has {more:g} descriptors more" for name, more in descriptors.items() if more > 20]


def _rss(samples: list[Sample]) -> float:
    return statistics.median(sample.rss for sample in samples)


def _open(samples: list[Sample]) -> float:
    return statistics.median(sample.descriptors for sample in samples)


def back_to_base(evidence: Evidence) -> None:
    """Keys and memory of the server are what they were, and the readers of the queues are the replicas that live."""
    cluster, redis = evidence.cluster, evidence.cluster.redis
    cluster.wait_until_served()
    started = time.monotonic()
    if not came_true(lambda: len(cluster.stored()) <= evidence.base, _CLEAN_S):
        evidence.fail(f"{evidence.base} keys before, now {sorted(cluster.stored())}")
    evidence.result.figures["keys as before after"] = f"{time.monotonic() - started:.0f} s"
    used = int(redis.info("memory")["used_memory"]) / _MIB
    evidence.result.figures["memory of the server after"] = f"{used:.2f} MiB"
    before = float(evidence.result.figures["memory of the server before"].split()[0])
    if used > before + _SERVER_MIB:
        evidence.fail(f"the server uses {used:.2f} MiB, {before:.2f} before")
    for name in ("Safe", "Once"):
        alive = set(cluster.state.observed.replicas(name))
        readers = {each["name"].decode() for each in redis.xinfo_consumers(cluster.keys.calls(name), GROUP)}
        if readers != alive:
            evidence.fail(f"{name} is read by {readers}, and its replicas are {alive}")


def no_drift(evidence: Evidence) -> None:
    """Calls late in the run take no longer than early ones (median beyond their run time, by 10 % and 2 ms)."""
    good = [call for call in evidence.calls.values() if call.answers and call.answers[0].outcome == OK]
    good.sort(key=lambda call: call.sent)
    third = len(good) // 3
    early, late = (
        statistics.median(call.answers[0].at - call.sent - call.seconds for call in part)
        for part in (good[:third], good[-third:])
    )
    figures = f"{early * 1000:.1f}, {late * 1000:.1f} ms"
    evidence.result.figures["median beyond run time, first and last third"] = figures
    if late > early * 1.1 + 0.002:
        evidence.fail(f"the median rose from {early * 1000:.1f} to {late * 1000:.1f} ms")


RUNS: tuple[Run, ...] = (
    LoadRun(
        "soak",
        "a death a minute for longer; what grows?",
        (KILL,),
        every_s=60,
        seconds=420,
        short_seconds=0,
        watch=measured,
        checks=(takeover(told_s=2), back_to_base, no_drift),
        needs_one_server=True,
    ),
)
