"""A large payload in chunks through Redis, from one process to another, while both live.

The sender stores chunks under keys of their own and says in a list that they are there; the receiver takes them away
and says in another list that there is room for more. So Redis holds `WINDOW` chunks at most, and each is sent, stored,
taken and checked while others are on their way. Each is signed, together with the name of the transfer and its place.

The receiver asks when it has a thread that takes what comes, so no sender waits for one that is busy. A sender that is
busy begins later: as long as its process lives, it is waited for.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from qserve.broker.inboxes import INBOX_TTL_MS, control_frame
from qserve.broker.keys import Keys
from qserve.broker.large.bulk_connection import BulkConnection
from qserve.broker.scripts import TELL
from qserve.errors import FrameRejected, QServeError
from qserve.wire.messages import TAG_BYTES, Control, Lent, Signer
from qserve.wire.parts import fresh

CHUNK = 1024 * 1024
WINDOW = 16
_GRANT = 4
"""Chunks that the receiver makes room for at a time."""
_TTL_MS = 30_000
_PATIENCE_S = 10
_ON_THEIR_WAY = 8
_GONE = b"gone"
_SENDER_GONE = "the process that had a large value is gone, or did not send it in time"


class TransferBroken(QServeError):
    """A large value did not arrive: its sender is gone, or has taken it back."""


@dataclass(frozen=True)
class Transfers:
    """Sends and receives, each on a thread of the caller's choice."""

    url: str
    keys: Keys
    signer: Signer

    def send(self, name: str, parts: Sequence[memoryview], is_there: Callable[[], bool]) -> None:
        """Send these parts to whoever receives under that name.

        Args:
            is_there: Whether they still are what they were; else the receiver is told that they are gone.

        Raises:
            TransferBroken: The receiver is gone.
            BrokerUnavailable, CommandRefused: Redis cannot be used.
        """
        with closing(BulkConnection.open(self.url)) as connection, closing(BulkConnection.open(self.url)) as waiting:
            ready, room = self.keys.transfer(name, "ready"), self.keys.transfer(name, "room")
            # On a connection of its own, where it holds nothing up: mostly the answer is there before it is needed.
            waiting.send(("BLPOP", room, _PATIENCE_S))
            allowed, unread = WINDOW, 0
            for number, chunk in enumerate(_chunks(parts)):
                if number == allowed:
                    if waiting.answer() is None:
                        raise TransferBroken(f"the receiver of transfer {name} is gone")
                    waiting.send(("BLPOP", room, _PATIENCE_S))
                    allowed += _GRANT
                tag = self.signer.tag(chunk, _about(name, number))
                if not is_there():
                    break
                connection.send(
                    ("SET", self.keys.transfer(name, str(number)), [tag, chunk], "PX", _TTL_MS),
                    ("RPUSH", ready, number),
                    ("PEXPIRE", ready, _TTL_MS),
                )
                unread = _read(connection, unread + 3, _ON_THEIR_WAY * 3)
            else:
                _read(connection, unread)
                return
            _read(connection, unread)
            self._refuse(connection, name)

    def refuse(self, name: str) -> None:
        """Tell whoever receives under that name that there is nothing."""
        with closing(BulkConnection.open(self.url)) as connection:
            self._refuse(connection, name)

    def _refuse(self, connection: BulkConnection, name: str) -> None:
        ready = self.keys.transfer(name, "ready")
        connection.call("RPUSH", ready, _GONE)
        connection.call("PEXPIRE", ready, _TTL_MS)

    def fetch(self, lent: Lent, is_wanted: Callable[[], bool]) -> list[memoryview]:
        """Ask the process that has lent a value for its parts, and receive them.

        Args:
            is_wanted: Whether it is still worth waiting for a sender that is busy.

        Raises:
            TransferBroken: They are gone, or their sender is.
            FrameRejected: A chunk is missing, cut, or not signed with an accepted key.
            BrokerUnavailable, CommandRefused: Redis cannot be used.
        """
        name = secrets.token_hex(16)
        control = Control("send", f"{name} {lent.cookie.hex()}:{lent.generation}")
        frame = control_frame(self.signer, lent.owner, control)
        with closing(BulkConnection.open(self.url)) as connection:
            names = (self.keys.inbox(lent.owner), self.keys.alive(lent.owner))
            if not connection.call("EVAL", TELL.source, len(names), *names, INBOX_TTL_MS, "0", frame):
                raise TransferBroken(_SENDER_GONE)

            def is_coming() -> bool:
                return is_wanted() and bool(connection.call("EXISTS", names[1]))

            return self._receive(connection, name, lent.sizes, is_coming)

    def receive(self, name: str, sizes: Sequence[int]) -> list[memoryview]:
        """Receive parts of these sizes from whoever sends them under that name; raises like `fetch`."""
        with closing(BulkConnection.open(self.url)) as connection:
            return self._receive(connection, name, sizes, lambda: False)

    def _receive(
        self, connection: BulkConnection, name: str, sizes: Sequence[int], is_coming: Callable[[], bool]
    ) -> list[memoryview]:
        parts = [fresh(size) for size in sizes]
        places = list(_chunks(parts))
        try:
            asked = 0
            for number, place in enumerate(places):
                if not number:
                    self._await_first(connection, name, is_coming)
                while asked < len(places) and asked < number + _ON_THEIR_WAY:
                    self._ask(connection, name, asked)
                    asked += 1
                self._take(connection, name, number, place)
        except BaseException:
            self._clean_up(name, len(places))
            raise
        return parts

    def _await_first(self, connection: BulkConnection, name: str, is_coming: Callable[[], bool]) -> None:
        """Wait until the first chunk is there: a sender that lives may have others to send to first."""
        wait = ("BLPOP", self.keys.transfer(name, "ready"), _PATIENCE_S)
        said = connection.call(*wait)
        while said is None and is_coming():
            said = connection.call(*wait)
        _check(said)

    def _ask(self, connection: BulkConnection, name: str, number: int) -> None:
        room = self.keys.transfer(name, "room")
        wait = ("BLPOP", self.keys.transfer(name, "ready"), _PATIENCE_S)
        take = ("GETDEL", self.keys.transfer(name, str(number)))
        if _gives_room(number):
            connection.send(wait, take, ("RPUSH", room, "1"), ("PEXPIRE", room, _TTL_MS))
        elif number:
            connection.send(wait, take)
        else:
            connection.send(take)

    def _take(self, connection: BulkConnection, name: str, number: int, place: memoryview) -> None:
        if number:
            _check(connection.answer())
        tag = bytearray(TAG_BYTES)
        size = connection.answer_into(memoryview(tag), place)
        if size != TAG_BYTES + len(place):
            raise FrameRejected(f"chunk {number} of a large value is {'missing' if size is None else 'cut'}")
        if not self.signer.holds(bytes(tag), place, _about(name, number)):
            raise FrameRejected(f"chunk {number} of a large value that no accepted key signed")
        if _gives_room(number):
            _read(connection, 2)

    def _clean_up(self, name: str, count: int) -> None:
        with closing(BulkConnection.open(self.url)) as connection:
            keys = [self.keys.transfer(name, str(number)) for number in range(count)]
            connection.call("DEL", *keys, self.keys.transfer(name, "ready"), self.keys.transfer(name, "room"))


def _check(said: list[bytes] | None) -> None:
    """Look at what the sender says of the next chunk, which is None if it has said nothing for long."""
    if said is None:
        raise TransferBroken(_SENDER_GONE)
    if said[1] == _GONE:
        raise TransferBroken("a large value is there no more: its sender has taken it back")


def _gives_room(number: int) -> bool:
    """Whether the receiver of this chunk says that there is room for `_GRANT` more."""
    return number % _GRANT == _GRANT - 1


def _about(name: str, number: int) -> bytes:
    return b"%b %d " % (name.encode(), number)


def _chunks(parts: Sequence[memoryview]) -> Iterator[memoryview]:
    for part in parts:
        for start in range(0, len(part), CHUNK):
            yield part[start : start + CHUNK]


def _read(connection: BulkConnection, unread: int, keep: int = 0) -> int:
    """Read answers until only `keep` are missing; returns how many are."""
    while unread > keep:
        connection.answer()
        unread -= 1
    return unread
