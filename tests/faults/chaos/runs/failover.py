"""Runs in which the primary dies with writes that its replica has not seen, and the replica takes its place."""

import time
from random import Random

from tests.faults.chaos.checks import recovery
from tests.faults.chaos.cluster import Cluster, Setup
from tests.faults.chaos.faults import Excuses, Fault, Injected
from tests.faults.chaos.play import Evidence, LoadRun, Run
from tests.faults.chaos.runs.server import still_deployed
from tests.faults.failover.sentinels import PASSWORD
from tests.support.waiting import wait_until

UNSEEN_S = 0.5
"""How long the primary takes writes that the replica does not get."""
LOST_TAIL = Excuses.of(safe="503", once="503 indeterminate", stream="503 502 broken indeterminate")
"""What was acknowledged and lost with the primary is told as such; nothing of it runs twice."""


def fail_over(cluster: Cluster, _dice: Random, event: Injected) -> None:
    """Cut the replica off, kill the primary a little later, and bring it back as a replica of its successor."""
    failover = cluster.failover
    assert failover is not None
    old = failover.primary()
    new = failover.other(old)
    with new.client() as replica, old.client() as primary:
        replica.config_set("masterauth", "wrong")
        primary.client_kill_filter(_type="replica")
        time.sleep(UNSEEN_S)
        old.kill()
        replica.config_set("masterauth", PASSWORD)
    wait_until(lambda: failover.primary() is new and new.role() == "master")
    event.ended = time.monotonic()
    old.start()
    wait_until(failover.is_ready)


def told_of_losses(evidence: Evidence) -> None:
    """How many calls were lost with the primary, every one of which was told."""
    evidence.result.figures["calls told that they may have run or not"] = str(evidence.result.judgement.indeterminate)


RUNS: tuple[Run, ...] = (
    LoadRun(
        "K8",
        "failover by sentinels; the primary dies with half a second of writes that only it has",
        (Fault("a failover", fail_over, LOST_TAIL, grace_s=10),),
        every_s=20,
        seconds=160,
        short_seconds=10,
        short_every_s=20,
        setup=Setup(sentinels=True, environment={"": {"QSERVE_STRICT": "1"}}),
        checks=(recovery(answered_s=10, serving_s=5), still_deployed, told_of_losses),
    ),
)
