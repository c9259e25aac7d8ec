"""Counts of ten seconds each, as rates, percentiles and curves."""

from itertools import pairwise

import pytest

from qserve.broker.history.buckets import BOUNDS_MS, BUCKET_S, Bucket
from qserve.operating.loads import curves, load_of

NOW = 1_000_000.0
SLOT = int(NOW) // BUCKET_S


def bucket(ago: int, **counts: object) -> Bucket:
    """What was counted so many times ten seconds ago."""
    facts = {"arrivals": 0, "ever": 0, "depth": 0, "waiting": 0, "oldest_ms": 0.0, "replicas": 2} | counts
    return Bucket(SLOT - ago, **facts)  # type: ignore[arg-type]


def place_of(milliseconds: float) -> int:
    """Where a histogram counts calls that took so long."""
    return sum(bound < milliseconds for bound in BOUNDS_MS)


def test_buckets_add_up_to_one_load() -> None:
    load = load_of(
        [
            bucket(2, arrivals=7, ends=("done", 4, "failed", 1), runs=(place_of(5), 5)),
            bucket(1, arrivals=3, ends=("done", 1, "cancelled", 2), runs=(place_of(5), 4, place_of(800), 1)),
        ],
        20,
    )
    assert (load.arrivals, load.ends) == (10, {"done": 5, "failed": 1, "cancelled": 2})
    assert (load.rate, load.failed) == (0.4, 1)
    assert load.p50_ms == pytest.approx(5, rel=0.3)
    assert load.p99_ms == pytest.approx(800, rel=0.3)
    assert (load.wait_p50_ms, load.wait_p99_ms) == (None, None)


def test_nothing_is_no_load() -> None:
    assert load_of([], 0).rate == 0


@pytest.mark.parametrize("milliseconds", [0.01, 0.5, 30.0, 2e6])
def test_a_percentile_lies_in_the_place_of_its_calls(milliseconds: float) -> None:
    place = place_of(milliseconds)
    estimate = load_of([bucket(1, runs=(place, 10))], 10).p50_ms
    assert estimate is not None
    low, high = ((0.0, *BOUNDS_MS) * 2)[place], (*BOUNDS_MS, BOUNDS_MS[-1])[min(place, len(BOUNDS_MS))]
    assert low <= estimate <= high or estimate == BOUNDS_MS[-1]


def test_curves_have_a_point_for_every_step_and_rates_for_a_second() -> None:
    found = curves(
        [
            bucket(3, arrivals=20, depth=5, oldest_ms=1500.0, ends=("done", 10, "failed", 10), replicas=3),
            bucket(1, waits=(place_of(30), 4), runs=(place_of(3), 4)),
        ],
        NOW,
        50,
    )
    assert {len(curve) for curve in found.values()} == {5}
    assert found["time"] == [NOW - 50, NOW - 40, NOW - 30, NOW - 20, NOW - 10]
    assert found["arrivals"] == [None, None, 2.0, 0.0, 0.0], "nobody had looked before the first bucket"
    assert (found["done"][2], found["failed"][2], found["depth"][2], found["oldest"][2]) == (1.0, 1.0, 5, 1.5)
    assert found["replicas"] == [None, None, 3, 3, 2]
    assert found["wait50"][:4] == [None] * 4
    assert found["wait50"][4] == pytest.approx(30, rel=0.3)
    assert found["run99"][4] == pytest.approx(3, rel=0.4)


def test_curves_have_a_gap_where_nobody_has_looked() -> None:
    found = curves([bucket(200, arrivals=10), bucket(100, arrivals=10)], NOW, 2000)
    known = [point is not None for point in found["arrivals"]]
    assert known == [True] * 60 + [False] * 40 + [True] * 60 + [False] * 40


def test_a_long_time_has_no_more_points_than_a_screen() -> None:
    found = curves([bucket(n, arrivals=1) for n in range(8640, 0, -1)], NOW, 86_400)
    assert len(found["time"]) == 360
    steps = {after - before for before, after in pairwise(found["time"]) if before is not None and after is not None}
    assert steps == {240.0}
    inner = [point for point in found["arrivals"] if point is not None][1:]
    assert set(inner) == {0.1}
