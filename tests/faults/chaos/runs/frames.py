"""A run in which somebody writes frames of their own into queues and inboxes while calls go on."""

from pathlib import Path
from random import Random

from qserve.settings import Settings
from tests.faults.chaos.cluster import Cluster
from tests.faults.chaos.faults import Fault, Injected
from tests.faults.chaos.play import Evidence, LoadRun, Run, came_true
from tests.faults.security.bad_frames import Aim, bad_frames, inboxes, queue

_AT_ONCE = 5


class Intruder:
    """Puts some frames of the table, at random, each time it is called; everything that it puts is to be counted."""

    def __init__(self) -> None:
        self._put: dict[Cluster, int] = {}
        self._before: dict[Cluster, int] = {}
        self._readers: dict[Cluster, list[str]] = {}

    def __call__(self, cluster: Cluster, dice: Random, _event: Injected) -> None:
        client, keys = cluster.redis, cluster.keys
        self._before.setdefault(cluster, self._rejected(cluster))
        processes = self._readers.setdefault(cluster, self._who_reads(cluster))
        for _ in range(_AT_ONCE):
            name, process = dice.choice(["Safe", "Once"]), dice.choice(processes)
            frames = bad_frames(Settings(), name, self._canary(cluster), process)
            frame = frames[dice.choice([each for each in frames if "a control message" not in each])]
            if not frame or dice.random() < 0.5:  # an empty one is not refused in an inbox: it only wakes its reader
                queue(client, Aim(keys, name, (process,)), frame)
            else:
                inboxes(client, Aim(keys, name, (process,)), frame)
            self._put[cluster] = self._put.get(cluster, 0) + 1

    def nothing_came_of_it(self, evidence: Evidence) -> None:
        """Each of them was refused and counted, and none was unpickled."""
        cluster = evidence.cluster
        put, before = self._put.pop(cluster, 0), self._before.pop(cluster, 0)
        came_true(lambda: self._rejected(cluster) - before >= put, 10)
        rejected = self._rejected(cluster) - before
        evidence.result.figures["bad frames put, refused"] = f"{put}, {rejected}"
        if rejected != put:
            evidence.fail(f"{put} bad frames were put and {rejected} refused")
        if self._canary(cluster).exists():
            evidence.fail("a frame was unpickled")

    @staticmethod
    def _who_reads(cluster: Cluster) -> list[str]:
        """Processes that have got something already; nodes, for one, live without an inbox."""
        client, keys = cluster.redis, cluster.keys
        alive = [key.decode().rpartition(":")[2] for key in client.scan_iter(keys.alive("*"))]
        return [each for each in alive if client.exists(keys.inbox(each))]

    @staticmethod
    def _canary(cluster: Cluster) -> Path:
        return cluster.folder / "canary"

    @staticmethod
    def _rejected(cluster: Cluster) -> int:
        return int(cluster.state.observed.counters().get("rejected_frames", 0))


_intruder = Intruder()

RUNS: tuple[Run, ...] = (
    LoadRun(
        "frames",
        "bad frames in queues and inboxes: forged, damaged, unsigned, pickled, of other places",
        (Fault("bad frames", _intruder),),
        every_s=1,
        seconds=120,
        short_seconds=6,
        short_every_s=0.3,
        checks=(_intruder.nothing_came_of_it,),
    ),
)
