"""A run in which calls carry values of 1 to 64 MiB, while those who have lent them die.

Both sides check every byte: a value that is torn, or another call's, makes a wrong answer.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import psutil

from tests.faults.chaos.checks import takeover
from tests.faults.chaos.cluster import Cluster, Setup, kill_at_once
from tests.faults.chaos.faults import NOTHING, Excuses, Fault, Injected, kill_replica, lose_node
from tests.faults.chaos.load import Load, Task
from tests.faults.chaos.play import Evidence, LoadRun, Run, came_true, start_caller
from tests.support.processes import command_line

_MIB = 2**20
_LARGE = Load(
    rate=8,
    kinds={"http-safe": 3, "http-once": 3, "handle-safe": 3, "handle-once": 3},
    durations=((1.0, 0.05),),
    sizes=((0.6, _MIB), (0.25, 4 * _MIB), (0.1, 16 * _MIB), (0.05, 64 * _MIB)),
)
_HANDLES = replace(_LARGE, kinds={"handle-safe": 1, "handle-once": 1})
"""A process that makes and checks values is too slow for the gateways, which close connections on which nothing comes,
while others do the same beside it."""
_DIED = Excuses.of(safe="502", once="502 indeterminate")
"""The result of a replica that dies before its caller has copied it is lost, and its caller is told. A request whose
body pauses, as it may on a machine that is busy, is a stream, and streams do not run again."""
_FORGOTTEN_S = 80.0
"""A result that nobody fetches, because its caller is dead, is given up after a minute; memory that is not used, after
ten seconds."""
_UNUSED_S = 20.0


def kill_caller(cluster: Cluster, dice: Random, event: Injected) -> None:
    """SIGKILL of a process that has called with large values, and has arguments and results under way."""
    with _doomed_caller(cluster, dice) as caller:
        caller.kill()
    event.killed.append(caller.pid)


def kill_everything(cluster: Cluster, dice: Random, event: Injected) -> None:
    """SIGKILL of a caller, every gateway, node, worker and replica in one moment; only Redis is left, and all comes
    back after some seconds."""
    with _doomed_caller(cluster, dice) as caller:
        processes = [*cluster.nodes, *cluster.gateways, caller]
        event.killed += kill_at_once([each for one in processes for each in cluster.tree(one.pid)])
    for one in processes[:-1]:
        one.wait()
    event.began = time.monotonic()
    time.sleep(2)
    for number in range(len(cluster.nodes)):
        cluster.start_node(number)
    for number in range(len(cluster.gateways)):
        cluster.start_gateway(number)
        cluster.wait_for_gateway(number)
    cluster.wait_until_served()


@contextlib.contextmanager
def _doomed_caller(cluster: Cluster, dice: Random) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that is in the middle of calling, and is dead after the block."""
    name = f"doomed-{dice.getrandbits(32):x}"
    load = replace(_HANDLES, processes=1)
    caller = start_caller(cluster, Task(name, dice.getrandbits(32), load, 60.0, cluster.gateway_urls, ""))
    assert caller.stdout is not None
    assert caller.stdin is not None
    caller.stdout.readline()
    time.sleep(dice.uniform(0.5, 1.5))
    yield caller
    caller.wait()
    caller.stdout.close()
    caller.stdin.close()


def memory_files(cluster: Cluster) -> dict[str, int]:
    """By process, the bytes of the memory files that it has open, if there are any."""
    found: dict[str, int] = {}
    for process in cluster.processes():
        folder, total = Path(f"/proc/{process.pid}/fd"), 0
        for fd in _listed(folder):
            try:
                if os.readlink(folder / fd).startswith("/memfd:qserve"):  # noqa: PTH115  the target is no path
                    total += os.stat(folder / fd).st_size  # noqa: PTH116
            except OSError:
                continue  # closed meanwhile
        if total:
            found[f"{process.pid} {command_line(process)[:80]}"] = total
    return found


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208
    except OSError:
        return []


def nothing_is_left(evidence: Evidence) -> None:
    """No memory file, and no key of a value, once nobody needs them any more."""
    cluster, keys = evidence.cluster, evidence.cluster.keys
    limit_s = _UNUSED_S if evidence.plan.is_slice else _FORGOTTEN_S
    began = time.monotonic()
    if not came_true(lambda: not memory_files(cluster), limit_s):
        evidence.fail(f"memory files are open after {limit_s:.0f} s, by process: {memory_files(cluster)}")
    evidence.result.figures["the last memory file was closed after"] = f"{time.monotonic() - began:.0f} s"
    if left := [*cluster.redis.scan_iter(keys.transfer("*", "*")), *cluster.redis.scan_iter(keys.payload("*"))]:
        evidence.fail(f"keys of values are left: {left[:5]}")
    sizes = [0]
    for process in cluster.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            sizes.append(process.memory_info().rss)
    evidence.result.figures["largest process afterwards"] = f"{max(sizes) / _MIB:.0f} MiB"


_KILL = Fault("SIGKILL of a replica", kill_replica, _DIED)
_LOSE = Fault("loss of a node", lose_node, _DIED, grace_s=15)
_CALLER = Fault("SIGKILL of a caller", kill_caller, NOTHING)
_EVERYTHING = Fault(
    "SIGKILL of everything but Redis",
    kill_everything,
    Excuses.of(safe="reset", once="reset 502 indeterminate"),
    grace_s=15,
)

RUNS: tuple[Run, ...] = (
    LoadRun(
        "K19",
        "values of 1 to 64 MiB, SIGKILL of replicas and of a node",
        (_KILL, _KILL, _LOSE),
        every_s=5,
        seconds=60,
        short_seconds=7,
        load=_LARGE,
        short_rate=6,
        setup=Setup(nodes=2),
        checks=(takeover(told_s=10, again_s=30), nothing_is_left),
    ),
    LoadRun(
        "K19-caller",
        "values of 1 to 64 MiB, SIGKILL of callers",
        (_CALLER,),
        every_s=8,
        seconds=40,
        short_seconds=0,
        load=_HANDLES,
        checks=(nothing_is_left,),
    ),
    LoadRun(
        "K19-all",
        "values of 1 to 64 MiB, SIGKILL of everything but Redis",
        (_EVERYTHING,),
        every_s=20,
        seconds=60,
        short_seconds=0,
        load=replace(_LARGE, processes=2),
        setup=Setup(nodes=2),
        checks=(nothing_is_left,),
    ),
)
