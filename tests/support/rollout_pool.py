"""A pool without processes, for what a worker decides about its replicas."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import msgspec

from qserve_workers.pool.rollout import Action, Publish, Resize, Rollout, Status
from qserve_workers.replica.replica_events import ReplicaEvent


class Pool:
    """Carries out what the rollout decides, as the real pool would, on a clock that stands still until told."""

    def __init__(self, concurrency: int, *, exact: bool = False) -> None:
        self.rollout = Rollout(concurrency, exact=exact)
        self.size = concurrency
        self.now = 0.0
        self.told: list[Action] = []
        self.status: Status | None = None
        self._pids: Iterator[int] = count(1)
        self.failures: dict[int, int] = {}
        self.fill()

    def fill(self) -> None:
        while len(self.rollout.crew.by_pid) < self.size:
            pid = next(self._pids)
            standby, self.failures[pid], rank = self.rollout.birth()
            self.rollout.born(pid, self.now, standby=standby, rank=rank)

    def act(self) -> list[Action]:
        actions = self.rollout.actions(self.now)
        for action in actions:
            if isinstance(action, Resize):
                self.size = action.processes
            elif isinstance(action, Publish):
                self.status = action.status
        self.told += [action for action in actions if not isinstance(action, Publish | Resize)]
        self.fill()
        return actions

    def say(self, pid: int, event: str, **facts: Any) -> None:
        told = {"pid": pid, "replica": f"r{pid}", "event": event, **facts}
        self.rollout.report(msgspec.convert(told, ReplicaEvent), self.now)
        self.act()

    def deploy(self, generation: int, revision: str, *, by: int, **facts: Any) -> None:
        self.say(by, "deployed", generation=generation, revision=revision, **facts)

    def state(self, pid: int, state: str, revision: str, generation: int = 1) -> None:
        self.say(pid, "state", state=state, revision=revision, generation=generation)

    def die(self, pid: int, how: str = "exit code 0") -> None:
        self.rollout.died(pid, how, self.now)
        self.act()

    @property
    def pids(self) -> set[int]:
        return set(self.rollout.crew.by_pid)

    def take_told(self) -> list[Action]:
        told, self.told = self.told, []
        return told
