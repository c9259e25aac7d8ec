"""Calls whose replica died while it had them: one of them may have been what killed it."""

from collections import deque
from collections.abc import Container

from qserve.broker.replica_queue import Entry

_KEPT = 16


class Suspects:
    """Suspects run apart from new calls, which would be harmed, and together, since most of them are innocent: one
    after the other they would keep callers waiting for the sum of their times. Nobody has its last chance in such
    company.

    Args:
        max_deliveries: How often a call is started at most.

    Attributes:
        on_trial: Entry ids of those that run now.
    """

    def __init__(self, max_deliveries: int) -> None:
        self.on_trial: set[bytes] = set()
        self._max_deliveries = max_deliveries
        self._waiting: deque[Entry] = deque()

    def add(self, entry: Entry) -> None:
        """Keep one until there is nothing beside it."""
        self._waiting.append(entry)

    def try_some(self, most: int) -> list[Entry]:
        """Those whose trial begins now, at least one."""
        chosen = [entry for entry in self._waiting if entry.deliveries < self._max_deliveries][:most]
        chosen = chosen or [self._waiting[0]]
        self.on_trial = {entry.id for entry in chosen}
        self._waiting = deque(entry for entry in self._waiting if entry.id not in self.on_trial)
        return chosen

    def put_back(self, entry: Entry) -> None:
        """Keep one whose trial could not begin; it is the next."""
        self._waiting.appendleft(entry)

    def end_trial(self, entry: bytes) -> None:
        """One of them has ended, or is no longer this replica's."""
        self.on_trial.discard(entry)

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
    def room(self) -> int:
        """How many more can wait here."""
        return max(0, _KEPT - len(self._waiting))
