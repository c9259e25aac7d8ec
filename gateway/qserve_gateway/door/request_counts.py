"""Counters of the requests that a listener answers; they cost so little that they are always on."""

import time
from bisect import bisect_left
from itertools import accumulate

from prometheus_client.samples import Exemplar

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histogram of latencies, in seconds."""


class Series:
    """The requests of one deployment whose responses have one class of status.

    Attributes:
        buckets: How many took longer than one of `BOUNDS_S` but no longer than the next; the last, longer than all.
    """

    __slots__ = ("buckets", "count", "exemplars", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self.buckets = [0] * (len(BOUNDS_S) + 1)
        self.exemplars: dict[int, Exemplar] = {}
        """By bucket: the last request in it that is traced."""


class RequestCounts:
    """Counts responses.

    Attributes:
        series: By deployment ("" where none was asked) and first digit of the status.
    """

    def __init__(self) -> None:
        self.series: dict[tuple[str, int], Series] = {}

    def count(self, deployment: str, status: int, seconds: float, trace: str | None = None) -> None:
        """Count a response that was written, or whose client left before that (status 499).

        Args:
            trace: The id of the request's trace, where it has one.
        """
        key = (deployment, status // 100)
        series = self.series.get(key)
        if series is None:
            series = self.series[key] = Series()
        series.count += 1
        series.seconds += seconds
        bucket = bisect_left(BOUNDS_S, seconds)
        series.buckets[bucket] += 1
        if trace is not None:
            series.exemplars[bucket] = Exemplar({"trace_id": trace}, seconds, time.time())

    def exemplars(self, deployment: str) -> dict[int, Exemplar]:
        """For each bucket of a deployment, a request in it that is traced, the last one of its class of status."""
        found: dict[int, Exemplar] = {}
        for (name, _), series in list(self.series.items()):
            if name == deployment:
                found |= series.exemplars
        return found

    def latencies(self) -> dict[str, tuple[list[int], float]]:
        """For each deployment, how many requests took no longer than each bound, how many in all, and their seconds."""
        found: dict[str, tuple[list[int], float]] = {}
        for (deployment, _), series in list(self.series.items()):  # more may come meanwhile: this runs on a thread
            buckets, seconds = found.get(deployment, ([0] * len(series.buckets), 0.0))
            buckets = [a + b for a, b in zip(buckets, series.buckets, strict=True)]
            found[deployment] = (buckets, seconds + series.seconds)
        return {name: (list(accumulate(buckets)), seconds) for name, (buckets, seconds) in found.items()}
