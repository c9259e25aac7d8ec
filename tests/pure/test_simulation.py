"""The simulation of a large fleet agrees with what can be worked out by hand."""

from dataclasses import replace

import pytest

from benchmarks.simulation import Costs, Fleet, simulate
from qserve.broker.keys import Keys
from qserve.settings import Settings
from qserve_workers.calls.takeover import look_every_s

SMALL = Fleet(gateways=12, shards=4, deployments=40, replicas=40, nodes=2)
QUIET = Costs(link=0, beats=0, neighbour=0, meta=0)


def test_deployments_lie_where_qserve_puts_them() -> None:
    keys = Keys("default", 4)
    assert [place + 1 for place in SMALL.places] == [keys.of(f"deployment{n}").shard for n in range(40)]


def test_replicas_are_divided_as_the_calls_are() -> None:
    assert SMALL.replicas_of == [1] * 40
    skewed = replace(SMALL, skew=1.0)
    assert skewed.replicas_of[0] == pytest.approx(40 * skewed.shares[0], abs=1)
    assert sum(skewed.shares_of_shards) == pytest.approx(sum(skewed.shares)) == pytest.approx(1)


def test_a_call_that_meets_no_other_takes_what_each_part_takes() -> None:
    fleet = replace(SMALL, costs=QUIET)
    alone = simulate(fleet, 1.0, 100.0)
    assert alone.percentile(0.99) == pytest.approx(QUIET.gateway + QUIET.shard + QUIET.replica)


@pytest.mark.parametrize(
    ("fleet", "first"), [(SMALL, "shard"), (replace(SMALL, deployments=4, replicas=4, work_s=0.05), "replica")]
)
def test_what_is_full_first_is_what_arithmetic_says(fleet: Fleet, first: str) -> None:
    limits = fleet.limits()
    assert min(limits, key=lambda each: limits[each]) == first
    seen = simulate(fleet, 0.8 * limits[first], 20_000 / limits[first])

    assert max(seen.busy, key=lambda each: seen.busy[each]) == first
    assert seen.busy[first] == pytest.approx(0.8, abs=0.15)


def test_past_that_the_queue_grows() -> None:
    limit = SMALL.limits()["shard"]
    before, after = (simulate(SMALL, part * limit, 20_000 / limit) for part in (0.7, 1.3))
    assert after.percentile(0.99) > 10 * before.percentile(0.99)


def test_what_an_idle_fleet_takes_grows_no_faster_than_the_fleet() -> None:
    for deployments in (1, 500):
        half = Fleet(deployments=deployments, replicas=500, gateways=100, nodes=50)
        whole = Fleet(deployments=2 * deployments if deployments > 1 else 1)
        for part, idle in half.idle().items():
            assert whole.idle()[part] <= 2.2 * idle, part


def test_each_of_many_replicas_looks_at_its_neighbours_less_often() -> None:
    settings = Settings(beat_interval_s=1.0, dead_after_s=5.0)
    assert look_every_s(1, settings) == look_every_s(200, settings) == 1.0
    assert look_every_s(600, settings) == 3.0
    assert look_every_s(5000, settings) == 5.0  # a replica that dies is noticed when it counts as dead, and not later
