"""What a worker tells a replica when it forks it, and what it wants of it later."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Birth:
    """What the parent tells a replica when it forks it.

    Attributes:
        worker, node: Ids of the Celery worker and of the node it belongs to.
        standby: Construct, then wait for `ReplicaProcess.serve` before taking calls.
        failures: Constructor failures so far; the replica waits accordingly before it tries.
        reports_fd: Pipe for events to the parent; see `qserve_workers.replica.replica_events`.
        scaled: Tell what there is to do, whatever the deployment says.
        rank: Its number among the replicas of its worker.
    """

    deployment: str
    worker: str
    node: str
    standby: bool
    failures: int
    reports_fd: int
    scaled: bool = False
    rank: int = 0


@dataclass(frozen=True)
class Wishes:
    """What the worker wants of a replica, whose event loop they belong to.

    Attributes:
        may_serve: A standby replica may take calls; one that asked for its turn may apply a change.
        may_leave: It may leave at the next moment without a call in hand; if none comes soon, it says so and stays.
        shall_leave: It is to finish its calls and end.
        hear: Returns once what earlier signals ask for is among these. Blocks; for any thread but the main one.
    """

    may_serve: asyncio.Event = field(default_factory=asyncio.Event)
    may_leave: asyncio.Event = field(default_factory=asyncio.Event)
    shall_leave: asyncio.Event = field(default_factory=asyncio.Event)
    hear: Callable[[], None] = lambda: None


async def first_of(*events: asyncio.Event, timeout: float | None = None) -> None:  # noqa: ASYNC109
    """Wait until one of the events is set, or the time is over."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
