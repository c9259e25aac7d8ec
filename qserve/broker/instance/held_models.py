"""Which replicas of a deployment hold which models, and calls that one replica hands over to another for that."""

from collections.abc import Callable, Mapping

from qserve.broker.connection import Answer, Connection, ignore_answer
from qserve.broker.inboxes import INBOX_TTL_MS, control_frame
from qserve.broker.keys import GROUP, Keys
from qserve.broker.scripts import HAND_OVER, HOLD_MODELS
from qserve.wire.messages import Control, Signer


class HeldModels:
    """The models of a deployment, as one of its replicas sees and changes them.

    Args:
        replica: Id of the replica.
    """

    def __init__(self, keys: Keys, signer: Signer, deployment: str, replica: str) -> None:
        self._keys = keys
        self._signer = signer
        self._replica = replica
        self._models = keys.models(deployment)
        self._names = (keys.calls(deployment), keys.heartbeats(deployment), self._models)

    def hold(self, connection: Connection, held: Mapping[str, bool], room: int | None) -> None:
        """Say for some models whether this replica holds them.

        Args:
            room: How many more it can take in; None where it takes no calls.
        """
        arguments = [part for model, is_held in held.items() for part in (model, "1" if is_held else "0")]
        counted = "" if room is None else str(room)
        HOLD_MODELS.send(connection, ignore_answer, (self._models,), self._replica, counted, *arguments)

    def hand_over(
        self,
        connection: Connection,
        entry: bytes,
        other: str,
        on_answer: Callable[[Answer], None],
        *,
        model: str,
        room: int,
    ) -> None:
        """Give a call for a model to another replica if that is better placed; `on_answer` gets what hand_over.lua
        returns.

        Args:
            other: The replica that is thought to hold the model, "" if none is.
            room: How many more models this replica can take in.
        """
        self._send(connection, entry, other, on_answer, Control("adopt", f"{entry.decode()} {model}"), model, room)

    def give_back(self, connection: Connection, entry: bytes, other: str, on_answer: Callable[[Answer], None]) -> None:
        """Give a call back to the replica that had it first; `on_answer` gets what hand_over.lua returns."""
        self._send(connection, entry, other, on_answer, Control("take_back", entry.decode()), "", 0)

    def _send(
        self,
        connection: Connection,
        entry: bytes,
        other: str,
        on_answer: Callable[[Answer], None],
        control: Control,
        model: str,
        room: int,
    ) -> None:
        frame = control_frame(self._signer, other, control, about=self._replica) if other else b""
        keys = (*self._names, self._keys.inbox(other), self._keys.alive(other))
        HAND_OVER.send(
            *(connection, on_answer, keys, GROUP, self._replica, entry),
            *(other, frame, INBOX_TTL_MS, model, room),
        )
