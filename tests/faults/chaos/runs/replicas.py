"""Runs in which replicas die, freeze, stand still, or are killed by what they are asked to do."""

import contextlib
import secrets
import time
from random import Random

import psutil

from qserve.broker.keys import GROUP
from qserve.calls.handle import get_handle
from tests.faults.chaos.checks import late_results, takeover
from tests.faults.chaos.cluster import Cluster, Setup
from tests.faults.chaos.faults import REPLICA_DIED, Excuses, Fault, Injected, freeze_replica, kill_replica, lose_node
from tests.faults.chaos.load import Load
from tests.faults.chaos.play import Evidence, LoadRun, Run, percentile

KILL = Fault("SIGKILL of a replica", kill_replica, REPLICA_DIED)
LOSE = Fault("loss of a node", lose_node, REPLICA_DIED, grace_s=15)
FREEZE = Fault("a replica frozen for 8 s", freeze_replica(8), REPLICA_DIED)
MOST_STALL_S = 5


def block_loop(cluster: Cluster, _dice: Random, event: Injected) -> None:
    """`time.sleep(60)` in an async handler of one replica; ends when that replica has been ended for it."""
    call_id = f"block-{secrets.token_hex(4)}"
    get_handle("Once").remote({"id": call_id, "nonce": "-", "seconds": 0, "fate": "block"})
    pid = _started_by(cluster, call_id)
    event.began = time.monotonic()
    with contextlib.suppress(psutil.NoSuchProcess):
        victim = psutil.Process(pid)
        while victim.is_running() and time.monotonic() - event.began < 60:
            time.sleep(0.05)
    event.killed.append(pid)


def _started_by(cluster: Cluster, call_id: str) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for path in cluster.ledgers.glob("replica-*"):
            if f"{call_id} START" in path.read_text():
                return int(path.name.partition("-")[2])
        time.sleep(0.05)
    raise AssertionError(f"no replica has started {call_id}")


def replaced_in_time(evidence: Evidence) -> None:
    """A replica whose loop stands still is ended and replaced, 10 s after the time it is given at most."""
    times = [event.ended - event.began for event in evidence.injected]
    evidence.result.figures["a stuck replica was ended after at most"] = f"{max(times):.1f} s"
    if max(times) > MOST_STALL_S + 10:
        evidence.fail(f"a stuck replica was ended after {max(times):.1f} s")


def others_go_on(evidence: Evidence) -> None:
    """Calls that other replicas run meanwhile are hardly slower (p99, by 1.5 and 250 ms on this loaded machine)."""
    stuck = {pid for event in evidence.injected for pid in event.killed}
    during: list[float] = []
    before: list[float] = []
    for call in evidence.calls.values():
        if call.answers and call.runs and call.runs[0].pid not in stuck:
            meanwhile = any(event.began < call.sent < event.ended for event in evidence.injected)
            (during if meanwhile else before).append(call.answers[0].at - call.sent - call.seconds)
    if not during or not before:
        return
    p99, base = percentile(during, 0.99), percentile(before, 0.99)
    figures = f"{p99 * 1000:.0f}, {base * 1000:.0f} ms"
    evidence.result.figures["p99 beyond run time, of others meanwhile and else"] = figures
    if p99 > base * 1.5 + 0.25 and not evidence.plan.is_slice:
        evidence.fail(f"calls in other replicas were slower meanwhile: p99 {p99:.3f} s, else {base:.3f} s")


def culprits_are_buried(evidence: Evidence) -> None:
    """Calls that end every replica they are given to are dead letters, after three of them, and nothing else is."""
    cluster, keys = evidence.cluster, evidence.cluster.keys
    deadly = [call for call in evidence.calls.values() if call.fate in {"abort", "exit"} and call.nature == "safe"]
    buried = sum(call.answers[0].outcome == "500" for call in deadly if call.answers)
    letters = int(cluster.redis.xlen(keys.dead_letters("Safe")))
    evidence.result.figures["calls that end their replica, dead letters"] = f"{buried}, {letters}"
    if letters != buried:
        evidence.fail(f"{letters} dead letters of {buried} calls that end their replica")
    if often := [call.id for call in deadly if len(call.runs) > 3]:
        evidence.fail(f"started more than 3 times: {often[:5]}")
    pending = cluster.redis.xpending(keys.calls("Safe"), GROUP)["pending"]
    if pending:
        evidence.fail(f"{pending} entries are pending for ever")


RUNS: tuple[Run, ...] = (
    LoadRun(
        "K1",
        "SIGKILL of a random replica",
        (KILL,),
        every_s=4,
        seconds=120,
        short_every_s=1.5,
        checks=(takeover(told_s=2),),
    ),
    LoadRun(
        "K1-node",
        "SIGKILL of a node with all its workers and replicas at once",
        (LOSE,),
        every_s=15,
        seconds=105,
        checks=(takeover(told_s=10, again_s=25),),
    ),
    LoadRun(
        "K2",
        "SIGSTOP of a replica for 8 s, then SIGCONT",
        (FREEZE,),
        every_s=10,
        seconds=110,
        short_seconds=12,
        checks=(late_results,),
    ),
    LoadRun(
        "K3",
        f"`time.sleep(60)` in an async handler; the loop may stand still for {MOST_STALL_S} s",
        (Fault("a blocked event loop", block_loop, REPLICA_DIED),),
        every_s=10,
        seconds=130,
        short_seconds=9,
        setup=Setup(environment={"": {"QSERVE_MAX_LOOP_STALL_S": str(MOST_STALL_S)}}),
        checks=(replaced_in_time, others_go_on, takeover(told_s=10, again_s=25)),
    ),
    LoadRun(
        "K12",
        "calls that abort() or _exit() their replica among others",
        seconds=100,
        short_seconds=6,
        load=Load(rate=150, durations=((0.7, 0.02), (0.3, 0.3)), fates=((0.01, "abort"), (0.002, "exit"))),
        short_rate=60,
        throughout=Fault("calls that end their replica", kill_replica, Excuses.of(once="502", stream="502 broken")),
        checks=(culprits_are_buried,),
    ),
)
