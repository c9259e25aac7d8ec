"""Counters of a namespace, which anybody may raise and the metrics show."""

from typing import Literal

from qserve.broker.connection import Connection, ignore_answer
from qserve.broker.keys import Keys

Counter = Literal[
    "rejected_frames", "late_results", "dead_letters", "indeterminate", "taken_over", "values_lent", "values_sent"
]
"""Rare events; `calls_of_replicas` and `calls_of_programs` count what was put on queues through handles."""


def count(connection: Connection, keys: Keys, counter: str, by: int = 1) -> None:
    """Raise a counter."""
    connection.send(ignore_answer, "HINCRBY", keys.counters, counter, by)
