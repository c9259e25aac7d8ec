"""Runs in which replicas die, freeze or stand still."""

from tests.chaos.checks import takeover
from tests.chaos.faults import REPLICA_DIED, Fault, kill_replica, lose_node
from tests.chaos.play import LoadRun, Run

KILL = Fault("SIGKILL of a replica", kill_replica, REPLICA_DIED)
LOSE = Fault("loss of a node", lose_node, REPLICA_DIED, grace_s=15)

RUNS: tuple[Run, ...] = (
    LoadRun(
        "K1",
        "SIGKILL of a random replica",
        (KILL,),
        every_s=4,
        seconds=150,
        short_every_s=1.5,
        checks=(takeover(told_s=2),),
    ),
    LoadRun(
        "K1-node",
        "SIGKILL of a node with all its workers and replicas at once",
        (LOSE,),
        every_s=15,
        seconds=90,
        checks=(takeover(told_s=10),),
    ),
)
