"""Calls whose replica died while it had them: one of them may have been what killed it."""

from collections import deque
from collections.abc import Container

from qserve.broker.replica_queue import Entry


class Suspects:
    """Suspects of this replica that wait to run again. Most suspects are innocent.

    So they run as soon as there is room, beside whatever else runs here. Only the last chance of a call is alone: its
    caller is told that it killed every replica, and that must not be the fault of its company.

    Args:
        max_deliveries: How often a call is started at most.

    Attributes:
        starting: Entry ids of those that were chosen and do not run yet.
        alone: Entry id of the one that has its last chance now, or b"".
    """

    def __init__(self, max_deliveries: int) -> None:
        self.starting: set[bytes] = set()
        self.alone = b""
        self._max_deliveries = max_deliveries
        self._waiting: deque[Entry] = deque()

    def add(self, entry: Entry) -> None:
        """Keep one until it can run."""
        self._waiting.append(entry)

    def choose(self, room: int, *, is_idle: bool) -> list[Entry]:
        """Take those whose trial begins now.

        Args:
            room: How many may begin.
            is_idle: Whether nothing runs here.
        """
        chosen = [entry for entry in self._waiting if not self._has_last_chance(entry)][: max(room, 0)]
        if not chosen and is_idle and not self.starting and self._waiting:
            chosen = [self._waiting[0]]
            self.alone = chosen[0].id
        self.starting |= {entry.id for entry in chosen}
        self._waiting = deque(entry for entry in self._waiting if entry.id not in self.starting)
        return chosen

    def put_back(self, entry: Entry) -> None:
        """Keep one whose trial could not begin; it is the next."""
        self._waiting.appendleft(entry)

    def end_trial(self, entry: bytes) -> None:
        """One of them has ended, or is no longer this replica's."""
        if entry == self.alone:
            self.alone = b""

    def forget(self, entries: Container[bytes]) -> None:
        """Leave some to other replicas, which have taken them."""
        self._waiting = deque(entry for entry in self._waiting if entry.id not in entries)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def entries(self) -> list[bytes]:
        """Ids of those that wait."""
        return [entry.id for entry in self._waiting]

    @property
    def want_to_be_alone(self) -> bool:
        """Whether one has its last chance now, or waits until nothing else runs here to have it."""
        return bool(self.alone) or any(map(self._has_last_chance, self._waiting))

    def _has_last_chance(self, entry: Entry) -> bool:
        return entry.deliveries >= self._max_deliveries
