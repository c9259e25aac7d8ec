"""Runs on a Redis cluster: slots move from server to server, and primaries die."""

import time
from random import Random

from qserve.broker.server.address import parse
from tests.faults.chaos.checks import recovery
from tests.faults.chaos.cluster import Cluster, Setup
from tests.faults.chaos.faults import Excuses, Fault, Injected
from tests.faults.chaos.play import LoadRun, Run
from tests.faults.chaos.runs.server import still_deployed
from tests.support.waiting import wait_until

BROKEN_OFF = Excuses.of(stream="broken 502")
"""A stream that sends just when its slot moves breaks off; no other call notices."""
LOST_TAIL = Excuses.of(safe="503", once="503 indeterminate", stream="503 502 broken indeterminate")


def _slot(cluster: Cluster, dice: Random) -> int:
    """The slot of a deployment, or of the home."""
    keys = dice.choice([cluster.keys, cluster.keys.of("Safe"), cluster.keys.of("Once")])
    return parse(keys.address("redis+cluster://x")).slot


def move(cluster: Cluster, dice: Random, _event: Injected) -> None:
    """Move a slot in one step."""
    assert cluster.shards is not None
    slot = _slot(cluster, dice)
    others = [node for node in cluster.shards.primaries() if node is not cluster.shards.primary_of(slot)]
    cluster.shards.move(slot, dice.choice(others))


def move_key_by_key(cluster: Cluster, dice: Random, _event: Injected) -> None:
    """Move a slot as servers before Valkey 9 do."""
    assert cluster.shards is not None
    slot = _slot(cluster, dice)
    others = [node for node in cluster.shards.primaries() if node is not cluster.shards.primary_of(slot)]
    cluster.shards.move_key_by_key(slot, dice.choice(others))


def fail_over(cluster: Cluster, dice: Random, event: Injected) -> None:
    """Kill a primary, and bring it back as a replica of its successor."""
    shards = cluster.shards
    assert shards is not None
    slot = _slot(cluster, dice)
    dead = shards.primary_of(slot)
    dead.kill()
    wait_until(lambda: shards.primary_of(slot) is not dead)
    event.ended = time.monotonic()
    dead.start()
    shards.wait_until_whole()


RUNS: tuple[Run, ...] = (
    LoadRun(
        "K17",
        "resharding: slots of deployments and of the home move",
        (Fault("a slot moves", move, BROKEN_OFF),),
        every_s=4,
        seconds=160,
        setup=Setup(shards=True),
        checks=(still_deployed,),
    ),
    LoadRun(
        "K20",
        "resharding key by key: slots are divided for a while, again and again",
        (Fault("a slot moves key by key", move_key_by_key, BROKEN_OFF),),
        every_s=2,
        seconds=160,
        setup=Setup(shards=True),
        checks=(still_deployed,),
    ),
    LoadRun(
        "K18",
        "a primary of a cluster dies, and its replica takes its place",
        (Fault("a failover", fail_over, LOST_TAIL, grace_s=10),),
        every_s=20,
        seconds=160,
        short_every_s=20,
        setup=Setup(shards=True, environment={"": {"QSERVE_STRICT": "1"}}),
        checks=(recovery(answered_s=10, serving_s=5), still_deployed),
    ),
)
