"""Counters of a namespace, which anybody may raise and the metrics show."""

from typing import Final, Literal, get_args

from qserve.broker.connection import Connection, ignore_answer
from qserve.broker.keys import Keys

Counter = Literal["rejected_frames", "late_results", "dead_letters", "indeterminate", "taken_over"]
"""Rare events; `calls_of_replicas` and `calls_of_programs` count what was put on queues through handles."""
RARE_EVENTS: Final[tuple[str, ...]] = get_args(Counter)
VALUES = {
    "values_lent": "lent",
    "values_passed_on": "passed_on",
    "values_sent": "sent",
    "values_stored": "stored",
}
"""Counters of large values, with the way that these have gone: opened on one host, and among those handed on for
another process; sent in chunks through Redis; stored there, because their call is durable."""


def count(connection: Connection, keys: Keys, counter: str, by: int = 1) -> None:
    """Raise a counter."""
    connection.send(ignore_answer, "HINCRBY", keys.counters, counter, by)


class ShareOfCounter:
    """What this process has added to a counter.

    Args:
        counter: Its name, or "" where others count.
    """

    def __init__(self, keys: Keys, counter: str) -> None:
        self._keys = keys
        self._counter = counter
        self._told = 0

    def tell(self, connection: Connection, share: int) -> None:
        """Let the share of this process be so much, if the connection is open."""
        if self._counter and connection.is_open and share > self._told:
            count(connection, self._keys, self._counter, share - self._told)
            self._told = share
