"""Counts of ten seconds each as rates, percentiles and curves."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from qserve.broker.history.buckets import BOUNDS_MS, BUCKET_S, Bucket

_MOST_POINTS = 360
_PLACES = 64
"""Of a histogram, with room for bounds that a later version may add."""
_SILENT_S = 600
"""After this long without a bucket nobody has looked: there is always one every five minutes."""


@dataclass
class Load:
    """What happened in a time.

    Attributes:
        ends: Outcome -> calls.
        p50_ms, p99_ms: Of the time that calls ran; None where none did.
    """

    arrivals: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    p50_ms: float | None = None
    p99_ms: float | None = None
    wait_p50_ms: float | None = None
    wait_p99_ms: float | None = None

    @property
    def rate(self) -> float:
        """Calls that ended per second."""
        return sum(self.ends.values()) / self.seconds if self.seconds else 0.0

    @property
    def failed(self) -> int:
        """Calls that did not end well."""
        return sum(count for outcome, count in self.ends.items() if outcome not in ("done", "cancelled"))


def load_of(buckets: Sequence[Bucket], seconds: float) -> Load:
    """What happened in the buckets of the last `seconds`."""
    # 72 hours are 25,920 buckets: there is no call for each of their numbers.
    ends: Counter[str] = Counter()
    waits, runs = [0] * _PLACES, [0] * _PLACES
    for bucket in buckets:
        for of, pairs in ((waits, bucket.waits), (runs, bucket.runs)):
            for at in range(0, len(pairs), 2):
                of[pairs[at]] += pairs[at + 1]
        for at in range(0, len(bucket.ends), 2):
            ends[bucket.ends[at]] += bucket.ends[at + 1]  # type: ignore[index,operator]
    return Load(
        sum(bucket.arrivals for bucket in buckets),
        dict(ends),
        seconds,
        *(_percentile(runs, 0.5), _percentile(runs, 0.99), _percentile(waits, 0.5), _percentile(waits, 0.99)),
    )


def curves(buckets: Sequence[Bucket], now: float, seconds: float) -> dict[str, list[float | None]]:
    """The last `seconds` as curves with the same number of points each, for plots.

    Rates are per second; where nobody has looked for long, curves have gaps.
    """
    step = max(BUCKET_S, int(seconds / _MOST_POINTS // BUCKET_S) * BUCKET_S)
    end = int(now // step) * step
    times = list(range(end - int(seconds // step) * step, end, step))
    names = ("arrivals", "done", "failed", "depth", "oldest", "wait50", "wait99", "run50", "run99", "replicas")
    found: dict[str, list[float | None]] = {"time": [float(time) for time in times], **{name: [] for name in names}}
    place, replicas, seen = 0, None, float("-inf")
    for time in times:
        group = []
        while place < len(buckets) and buckets[place].slot * BUCKET_S < time + step:
            if buckets[place].slot * BUCKET_S >= time:
                group.append(buckets[place])
            place += 1
        if group:
            replicas, seen = group[-1].replicas, time
        known = time - seen < _SILENT_S
        load = load_of(group, step)
        point: dict[str, float | None] = {
            "arrivals": load.arrivals / step,
            "done": (sum(load.ends.values()) - load.failed) / step,
            "failed": load.failed / step,
            "depth": max((bucket.depth for bucket in group), default=0),
            "oldest": max((bucket.oldest_ms for bucket in group), default=0) / 1000,
            "wait50": load.wait_p50_ms,
            "wait99": load.wait_p99_ms,
            "run50": load.p50_ms,
            "run99": load.p99_ms,
            "replicas": replicas,
        }
        for name in names:
            found[name].append(point[name] if known else None)
    return found


def _percentile(counts: Sequence[int], share: float) -> float | None:
    """An estimate: within its place, a call is taken to be as far on the way as the others let it."""
    total = sum(counts)
    if not total:
        return None
    sums = list(accumulate(counts))
    place = bisect_left(sums, share * total)
    low = BOUNDS_MS[min(place, len(BOUNDS_MS)) - 1] if place else 0.0
    high = BOUNDS_MS[min(place, len(BOUNDS_MS) - 1)]
    before = sums[place - 1] if place else 0
    return low + (high - low) * (share * total - before) / max(1, counts[place])
