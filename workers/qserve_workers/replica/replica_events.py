"""What a replica tells its worker: one line of JSON for each event, through a pipe that all replicas of a worker share.

The worker decides from these events alone, so this module has them all; both sides match on their classes.
"""

import logging
import os
from typing import Any, Final, TypeAlias

import msgspec

from qserve.wire.autoscaling import Autoscaling

logger = logging.getLogger(__name__)

_LONGEST_ERROR: Final = 3000


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """What every event says.

    Attributes:
        pid: Of the process that tells it.
        replica: Id of the replica.
    """

    pid: int = 0
    replica: str = ""


class DeploymentSeen(Event, frozen=True, kw_only=True, tag="deployed"):
    """What is deployed now; told at every change, whatever the replica is busy with."""

    generation: int
    revision: str
    num_replicas: int = 1
    surge: bool = True
    initialization_timeout: float = 600.0
    graceful_timeout: float = 20.0
    autoscaling: Autoscaling | None = None
    most_failures: int = 100


class DeletionSeen(Event, frozen=True, kw_only=True, tag="deleted"):
    """The deployment was deleted."""


class StateEntered(Event, frozen=True, kw_only=True, tag="state"):
    """The replica is STARTING, STANDBY, SERVING or DRAINING from now on."""

    state: str
    generation: int
    revision: str


class ConstructionFailed(Event, frozen=True, kw_only=True, tag="failed"):
    """The replica could not be constructed, and ends."""

    generation: int
    revision: str
    error: str


class HealthLost(Event, frozen=True, kw_only=True, tag="ill"):
    """The replica is ill and is to be replaced; it serves until it is."""

    error: str


class TurnWanted(Event, frozen=True, kw_only=True, tag="asks_to_apply"):
    """The replica has seen a change that it applies when its turn has come."""

    generation: int


class ChangeApplied(Event, frozen=True, kw_only=True, tag="applied"):
    """The replica serves that generation."""

    generation: int


class ReconfigureFailed(Event, frozen=True, kw_only=True, tag="reconfigure_failed"):
    """The replica serves on with its old configuration."""

    generation: int
    error: str


class CallsCounted(Event, frozen=True, kw_only=True, tag="stats"):
    """How many calls the replica has in hand, and has handled."""

    running: int
    handled: int


class StillBusy(Event, frozen=True, kw_only=True, tag="busy"):
    """The replica was told that it may leave when it is idle, and stays, because it is not."""

    running: int


class DemandMeasured(Event, frozen=True, kw_only=True, tag="demand"):
    """How much there is to do.

    Attributes:
        calls: Queued and running, over all nodes.
        waited_s: How long the first call that nobody has taken has waited.
        place, nodes: Which of how many nodes this worker belongs to.
        running: How many calls the replica has in hand.
    """

    calls: int
    waited_s: float
    place: int
    nodes: int
    running: int


ReplicaEvent: TypeAlias = (
    DeploymentSeen
    | DeletionSeen
    | StateEntered
    | ConstructionFailed
    | HealthLost
    | TurnWanted
    | ChangeApplied
    | ReconfigureFailed
    | CallsCounted
    | StillBusy
    | DemandMeasured
)

_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(ReplicaEvent)


def decode_event(line: bytes) -> ReplicaEvent:
    """The event of a line.

    Raises:
        msgspec.DecodeError: It is none.
    """
    event: ReplicaEvent = _decoder.decode(line)
    return event


class EventWriter:
    """The replica's end of the pipe.

    Args:
        descriptor: Of the pipe.
        replica: Id of the replica.
    """

    def __init__(self, descriptor: int, replica: str) -> None:
        self._descriptor = descriptor
        self._replica = replica

    def tell(self, event: ReplicaEvent) -> None:
        """Tell the worker, if it still lives."""
        changes: dict[str, Any] = {"pid": os.getpid(), "replica": self._replica}
        if isinstance(event, ConstructionFailed | ReconfigureFailed | HealthLost):
            changes["error"] = _shortened(event.error)
        try:
            os.write(self._descriptor, _encode(msgspec.structs.replace(event, **changes)) + b"\n")
        except OSError as exc:  # the parent is gone, and this process soon will be
            logger.debug("could not tell the worker: %s", exc)


def _shortened(error: str) -> str:
    """The end of a text: a line must fit into one atomic write, however its characters are escaped."""
    error = error.encode("utf-8", "replace").decode()[-_LONGEST_ERROR:]
    while len(_encode(error)) > _LONGEST_ERROR:
        error = error[len(error) // 8 + 1 :]
    return error
