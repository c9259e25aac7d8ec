"""Runs in which the server dies, comes back with or without its data, freezes, or runs out of memory."""

import signal
import time
from random import Random

import redis

from tests.faults.chaos.checks import recovery
from tests.faults.chaos.cluster import Cluster, Setup
from tests.faults.chaos.faults import Act, Excuses, Fault, Injected
from tests.faults.chaos.play import Evidence, LoadRun, Run

BROKER_AWAY = Excuses.of(
    safe="503", once="503 indeterminate", stream="503 502 broken indeterminate", durable="503 indeterminate"
)
_MIB = 1 << 20
_BALLAST = "ballast"


def restart_server(cluster: Cluster, dice: Random, _event: Injected) -> None:
    """SIGKILL of the server, and the same again up to 3 s later."""
    cluster.server.kill()
    time.sleep(dice.uniform(0, 3))
    cluster.server.start()


def freeze_server(seconds: float) -> Act:
    """SIGSTOP of the server, then SIGCONT."""

    def act(cluster: Cluster, _dice: Random, _event: Injected) -> None:
        cluster.server.signal(signal.SIGSTOP)
        time.sleep(seconds)
        cluster.server.signal(signal.SIGCONT)

    return act


def fill_server(cluster: Cluster, _dice: Random, event: Injected) -> None:
    """Ballast up to maxmemory, which stays for 5 s; then it goes."""
    client = cluster.redis
    used = int(client.info("memory")["used_memory"])
    client.config_set("maxmemory", used + 32 * _MIB)
    number = 0
    for size in (_MIB, 1 << 16, 1 << 12, 1 << 6):
        while True:
            try:
                client.set(f"{_BALLAST}{number}", b"x" * size)
            except redis.exceptions.OutOfMemoryError:
                break
            number += 1
    event.began = time.monotonic() - 1
    time.sleep(5)
    client.delete(*(f"{_BALLAST}{each}" for each in range(number)))
    client.config_set("maxmemory", 0)


def still_deployed(evidence: Evidence) -> None:
    """Nothing has been undeployed: what was there before is there, with all its replicas."""
    evidence.cluster.wait_until_served(30)
    found = sorted(evidence.cluster.state.list())
    if found != ["Once", "Safe"]:
        evidence.fail(f"deployed is {found}")


RUNS: tuple[Run, ...] = (
    LoadRun(
        "K5",
        "SIGKILL of the server and restart with its append-only file",
        (Fault("SIGKILL of the server", restart_server, BROKER_AWAY, grace_s=5),),
        every_s=15,
        seconds=180,
        short_every_s=4,
        checks=(recovery(answered_s=5, serving_s=5), still_deployed),
    ),
    LoadRun(
        "K6",
        "SIGKILL of the server, which comes back empty",
        (Fault("loss of the server's data", restart_server, BROKER_AWAY, grace_s=10),),
        every_s=25,
        seconds=150,
        short_seconds=12,
        short_every_s=20,
        setup=Setup(persistent=False),
        checks=(recovery(answered_s=5, serving_s=10), still_deployed),
    ),
    LoadRun(
        "K7",
        "SIGSTOP of the server for 1, 5 and 15 s",
        tuple(
            Fault(f"the server frozen for {seconds} s", freeze_server(seconds), BROKER_AWAY, grace_s=5)
            for seconds in (1, 5, 15)
        ),
        every_s=18,
        seconds=170,
        short_seconds=8,
        short_every_s=3,
        checks=(recovery(answered_s=10, serving_s=5), still_deployed),
    ),
    LoadRun(
        "K11",
        "maxmemory reached for 5 s",
        (Fault("maxmemory", fill_server, Excuses.all("503"), grace_s=5),),
        every_s=15,
        seconds=80,
        short_seconds=9,
        checks=(recovery(answered_s=5, serving_s=5),),
        needs_one_server=True,
    ),
)
