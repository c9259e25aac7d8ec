"""How fast deployments work off their queues, so that whoever is turned away knows when to come back."""

import time
from typing import Any

from qserve.background import CHANCE
from qserve.broker.connection import Answer, Connection

SHORTEST_S, LONGEST_S = 1.0, 30.0
"""Between these a refused caller is told to wait."""
_LOOK_EVERY_S = 1.0
_TOO_OLD_S = 30.0


class Pace:
    """How many calls leave one queue in a second, whoever put them there. It is measured only while calls are refused.

    A stream counts what was ever added to it; less its length, that is what was ever answered.
    """

    def __init__(self, stream: str) -> None:
        self._stream = stream
        self._looked_at = 0.0
        self._seen: tuple[float, int] | None = None
        self._per_s: float | None = None

    def look(self, connection: Connection) -> None:
        """Look how far the queue has come, once a second."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_EVERY_S:
            return
        if now - self._looked_at > _TOO_OLD_S:
            self._seen = self._per_s = None
        self._looked_at = now
        connection.send(self._take, "XINFO", "STREAM", self._stream)

    def wait_s(self, depth: int) -> float:
        """The seconds in which so many calls will have left, give or take a quarter, so that not all return at once."""
        if self._per_s is None:
            return CHANCE.uniform(SHORTEST_S, 3)
        expected = depth / self._per_s if self._per_s else LONGEST_S
        # Spread after the upper limit is applied, or a crowd told to wait for longest would return together.
        wait = min(expected, LONGEST_S / 1.25) * CHANCE.uniform(0.75, 1.25)
        return max(wait, CHANCE.uniform(SHORTEST_S, 1.25 * SHORTEST_S))

    def _take(self, answer: Answer) -> None:
        if isinstance(answer, Exception):
            return
        found: dict[bytes, Any] = dict(zip(answer[::2], answer[1::2], strict=True))
        now, answered = time.monotonic(), int(found.get(b"entries-added", 0)) - int(found[b"length"])
        if self._seen is not None and now > self._seen[0]:
            self._per_s = max(0.0, (answered - self._seen[1]) / (now - self._seen[0]))
        self._seen = now, answered
