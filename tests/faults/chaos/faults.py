"""Faults: what is done to a cluster, when, and what calls may end as because of it.

A `Fault` is a description; `Injected` is one time that it was done. A call that did not end well is excused only by a
fault that was going on, or had just been, while the call was under way.
"""

import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import psutil

from tests.faults.chaos.cluster import Cluster, kill_at_once


class Excuses(NamedTuple):
    """Outcomes, besides "ok", that a fault allows for each nature of call (see `ledger.Call.nature`)."""

    safe: frozenset[str] = frozenset()
    once: frozenset[str] = frozenset()
    stream: frozenset[str] = frozenset()
    durable: frozenset[str] = frozenset()

    @classmethod
    def of(cls, *, safe: str = "", once: str = "", stream: str = "", durable: str = "") -> "Excuses":
        """From outcomes separated by spaces."""
        return cls(*(frozenset(names.split()) for names in (safe, once, stream, durable)))

    @classmethod
    def all(cls, outcomes: str) -> "Excuses":
        """The same for every nature."""
        return cls.of(safe=outcomes, once=outcomes, stream=outcomes, durable=outcomes)


NOTHING = Excuses()
"""Every call has to end well."""


@dataclass
class Injected:
    """One time that a fault was done; times of the monotonic clock.

    Attributes:
        ended: When whatever was broken could be used again: when `act` returned, unless it says earlier. inf while it
            goes on.
        killed: Pids of processes that have ended.
        via: URL of the gateway whose calls alone it concerns, "" for all.
    """

    fault: "Fault"
    began: float
    ended: float = float("inf")
    killed: list[int] = field(default_factory=list)
    via: str = ""


Act = Callable[[Cluster, Random, Injected], None]


@dataclass(frozen=True)
class Fault:
    """Something that can happen to a cluster.

    Attributes:
        act: Does it, and undoes what has to be undone, on the suite's thread. Notes in `Injected` what it killed.
        excuses: What calls may end as because of it.
        grace_s: For how long after it has ended.
    """

    name: str
    act: Act
    excuses: Excuses = NOTHING
    grace_s: float = 10.0

    def inject(self, cluster: Cluster, dice: Random, injected: list[Injected]) -> None:
        """Do it once, and note it."""
        event = Injected(self, time.monotonic())
        injected.append(event)
        self.act(cluster, dice, event)
        event.ended = min(event.ended, time.monotonic())


REPLICA_DIED = Excuses.of(once="502", stream="502 broken")
"""Safe and durable calls run again; the others are told."""


def kill_replica(cluster: Cluster, dice: Random, event: Injected) -> None:
    """SIGKILL of one replica; its worker lives and replaces it."""
    found = cluster.replicas()
    if found:
        victim = dice.choice(found)
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
            event.killed.append(victim.pid)


def lose_node(cluster: Cluster, dice: Random, event: Injected) -> None:
    """The end of a node with all its workers and replicas in one moment, nobody left to tell; another comes later."""
    number = dice.randrange(len(cluster.nodes))
    event.killed += kill_at_once(cluster.tree(cluster.nodes[number].pid))
    cluster.nodes[number].wait()
    event.began = time.monotonic()
    time.sleep(2)
    cluster.start_node(number)
    cluster.wait_until_served()


def freeze_replica(seconds: float) -> Act:
    """SIGSTOP of one replica, SIGCONT after some seconds: what it had is taken over, and it comes back late."""

    def act(cluster: Cluster, dice: Random, event: Injected) -> None:
        found = cluster.replicas()
        if not found:
            return
        victim = dice.choice(found)
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            victim.send_signal(signal.SIGCONT)

    return act
