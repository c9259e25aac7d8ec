"""How slow this machine is now, and so how long a test has to wait before it takes something for a hang.

Deadlines in tests are written for an idle machine of the kind they were written on. `patience` stretches them on a
machine that is slower, or busy with other work. It never shortens them.
"""

import os
import time
from collections import deque

_WORK_S = 0.009
"""What the piece of work takes on that machine when nothing else runs there."""
_EVERY_S = 5.0
_REMEMBERED_S = 60.0


class Slowness:
    """Measures the machine at most every few seconds; the worst of the last minute counts."""

    def __init__(self) -> None:
        self._measured: deque[tuple[float, float]] = deque()

    def now(self) -> float:
        """How many times longer things take than on an idle machine; at least 1."""
        now = time.monotonic()
        if not self._measured or now - self._measured[-1][0] > _EVERY_S:
            self._measured.append((now, self._measure()))
            while now - self._measured[0][0] > _REMEMBERED_S:
                self._measured.popleft()
        return max(factor for _, factor in tuple(self._measured))  # other threads measure, too

    def _measure(self) -> float:
        began = time.perf_counter()
        total = 0
        for number in range(100_000):
            total += number * number % 7
        took = time.perf_counter() - began
        # The work alone would miss a load that lets short work through, the load alone a slow processor.
        return max(1.0, took / _WORK_S, os.getloadavg()[0] / (os.cpu_count() or 1))


_slowness = Slowness()


def patience(seconds: float) -> float:
    """How long to wait here and now for what takes at most `seconds` on an idle machine."""
    return seconds * _slowness.now()
