"""Runs in which gateways die."""

import time
from random import Random

from tests.faults.chaos.cluster import Cluster
from tests.faults.chaos.faults import Excuses, Fault, Injected
from tests.faults.chaos.play import Evidence, LoadRun, Run, came_true

KEYS_GONE_S = 75.0
"""A minute for the inbox of a dead gateway, and some for the expiry to be seen."""


def kill_gateway(cluster: Cluster, dice: Random, event: Injected) -> None:
    """SIGKILL of one gateway, and another in its place."""
    number = dice.randrange(len(cluster.gateways))
    event.via = cluster.gateway_urls[number]
    cluster.gateways[number].kill()
    cluster.gateways[number].wait()
    event.killed.append(cluster.gateways[number].pid)
    time.sleep(0.3)
    cluster.start_gateway(number)
    cluster.wait_for_gateway(number)


def keys_are_gone(evidence: Evidence) -> None:
    """Nothing of dead gateways stays in Redis: the count of keys is what it was. Takes too long for the slice."""

    def surplus() -> int:
        return len(evidence.cluster.stored()) - evidence.base

    if evidence.plan.is_slice:
        return
    started = time.monotonic()
    if came_true(lambda: surplus() <= 0, KEYS_GONE_S):
        evidence.result.figures["keys of dead gateways gone after"] = f"{time.monotonic() - started:.0f} s"
    else:
        evidence.fail(f"{surplus()} keys more than before: {sorted(evidence.cluster.stored())}")


RUNS: tuple[Run, ...] = (
    LoadRun(
        "K4",
        "SIGKILL of a gateway",
        (
            Fault(
                "SIGKILL of a gateway",
                kill_gateway,
                Excuses.of(safe="reset", once="reset", stream="reset broken", durable="reset"),
                grace_s=1,
            ),
        ),
        every_s=8,
        seconds=95,
        short_every_s=4,
        checks=(keys_are_gone,),
    ),
)
