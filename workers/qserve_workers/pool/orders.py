"""What a rollout tells the pool to do, and the world to know."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Resize:
    """Keep this many processes, those on their way out included."""

    processes: int


@dataclass(frozen=True)
class Stop:
    """Tell a replica to finish its calls and leave."""

    pid: int


@dataclass(frozen=True)
class Release:
    """Tell a replica to leave as soon as it has no call in hand; if that does not come soon, it says so and stays."""

    pid: int


@dataclass(frozen=True)
class Serve:
    """Tell a replica that its turn has come: a standby one reads calls, as what it replaces has gone; one that serves
    and asked to reconfigure does so."""

    pid: int


@dataclass(frozen=True)
class Kill:
    """End a process that does not go by itself."""

    pid: int
    why: str


@dataclass(frozen=True)
class Status:
    """What the world is told about this worker; see `qserve.wire.spec.WorkerInfo`."""

    generation: int
    state: str
    wanted: int
    ready: int
    error: str = ""


@dataclass(frozen=True)
class Publish:
    """Tell the world; None: there is nothing deployed to tell about."""

    status: Status | None


Action = Resize | Stop | Release | Serve | Kill | Publish
