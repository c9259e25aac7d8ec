"""When there are to be more or fewer replicas, and who goes: measurements and reports in, decisions out."""

import pytest

from qserve import serve
from qserve.wire.autoscaling import Autoscaling
from qserve.wire.spec import HEALTHY
from qserve_workers.pool.rollout import Release, Resize, Stop
from qserve_workers.pool.scaling import Scaler, WorkerDemand
from tests.support.rollout_pool import Pool

POLICY = Autoscaling(min_replicas=1, max_replicas=8, target_ongoing_requests=2, upscale_delay_s=5, downscale_delay_s=60)


class Clock:
    """A worker whose calls are counted once a second."""

    def __init__(self, policy: Autoscaling = POLICY, place: int = 0, nodes: int = 1) -> None:
        self.scaler = Scaler()
        self.policy = policy
        self.place, self.nodes = place, nodes
        self.now = 100.0
        self.replicas = 1

    def pass_seconds(self, seconds: int, calls: int, waited_s: float = 0.0, ready: int | None = None) -> int:
        for _ in range(seconds):
            self.now += 1
            demand = WorkerDemand(calls, waited_s, self.place, self.nodes, self.now)
            ready_now = self.replicas if ready is None else ready
            self.replicas = self.scaler.decide(
                demand, self.policy, current=self.replicas, ready=ready_now, now=self.now
            )
        return self.replicas


def test_more_calls_than_the_target_for_long_enough_bring_more_replicas() -> None:
    worker = Clock()
    assert worker.pass_seconds(5, calls=7) == 1
    assert worker.pass_seconds(1, calls=7) == 4
    assert worker.pass_seconds(10, calls=1000) == 8


def test_each_time_more_replicas_are_needed_they_must_have_been_for_long_enough() -> None:
    worker = Clock()
    assert worker.pass_seconds(6, calls=7) == 4
    assert worker.pass_seconds(5, calls=16) == 4
    assert worker.pass_seconds(1, calls=16) == 8


def test_the_first_number_of_replicas_may_be_given_and_goes_as_every_other() -> None:
    policy = Autoscaling(min_replicas=1, max_replicas=9, initial_replicas=4, downscale_delay_s=5)
    worker = Clock(policy)
    assert worker.pass_seconds(5, calls=0) == 4
    assert worker.pass_seconds(1, calls=0) == 1
    assert Clock(policy, place=1, nodes=3).pass_seconds(1, calls=0) == 1


def test_a_moment_of_many_calls_brings_none() -> None:
    worker = Clock()
    for _ in range(5):
        worker.pass_seconds(4, calls=100)
        assert worker.pass_seconds(1, calls=1) == 1


def test_fewer_calls_for_long_enough_take_away_as_many_as_were_never_needed() -> None:
    worker = Clock()
    worker.pass_seconds(6, calls=16)
    worker.pass_seconds(30, calls=0)
    assert worker.pass_seconds(1, calls=6) == 8
    assert worker.pass_seconds(29, calls=0) == 8
    assert worker.pass_seconds(1, calls=0) == 3  # as many as the 6 calls half-way needed
    assert worker.pass_seconds(61, calls=0) == 1


def test_a_call_that_waits_too_long_brings_one_more_when_all_that_were_asked_for_serve() -> None:
    worker = Clock()
    worker.replicas = 2
    assert worker.pass_seconds(20, calls=3, waited_s=11, ready=1) == 2
    assert worker.pass_seconds(6, calls=3, waited_s=11) == 3
    assert worker.pass_seconds(5, calls=3, waited_s=9) == 3


def test_bounds_hold_at_once() -> None:
    worker = Clock(Autoscaling(2, 3))
    assert worker.pass_seconds(1, calls=0) == 2
    worker.policy = Autoscaling(5, 6)
    assert worker.pass_seconds(1, calls=0) == 5
    worker.policy = Autoscaling(1, 1)
    assert worker.pass_seconds(1, calls=100) == 1


@pytest.mark.parametrize(("nodes", "replicas"), [(1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (7, [1] * 7)])
def test_nodes_share_the_replicas_and_each_has_one(nodes: int, replicas: list[int]) -> None:
    workers = [Clock(POLICY, place, nodes) for place in range(nodes)]
    assert [worker.pass_seconds(6, calls=10) for worker in workers] == replicas


def test_a_moment_in_which_all_were_needed_begins_the_time_anew_and_does_not_end_it() -> None:
    worker = Clock()
    worker.pass_seconds(6, calls=16)
    worker.pass_seconds(30, calls=0)
    assert worker.pass_seconds(1, calls=16) == 8
    assert worker.pass_seconds(60, calls=0) == 8
    assert worker.pass_seconds(1, calls=0) == 1


@pytest.mark.parametrize("place", range(6))
def test_there_are_never_fewer_replicas_than_nodes(place: int) -> None:
    worker = Clock(Autoscaling(1, 4, upscale_delay_s=5, downscale_delay_s=60), place, nodes=6)
    assert {worker.pass_seconds(1, calls=0) for _ in range(70)} == {1}
    assert worker.pass_seconds(10, calls=1000) == 1


@pytest.mark.parametrize("calls", [0, 100])
def test_an_old_measurement_changes_nothing(calls: int) -> None:
    worker = Clock()
    worker.pass_seconds(6, calls=8)
    old = WorkerDemand(calls, 0, 0, 1, worker.now)
    for later in range(6, 100):
        assert worker.scaler.decide(old, POLICY, current=4, ready=4, now=worker.now + later) == 4


# Who goes


def scaled(n: int) -> Pool:
    pool = Pool(1)
    pool.deploy(1, "a", by=1, autoscaling={"min_replicas": 1, "max_replicas": 8})
    pool.rollout.scale(n, 1)
    pool.act()
    for pid in range(1, n + 1):
        pool.state(pid, "SERVING", "a")
    pool.take_told()
    return pool


def test_idle_replicas_go_first_and_who_says_it_is_busy_stays() -> None:
    pool = scaled(3)
    for pid in (1, 3):
        pool.say(pid, "demand", running=1, calls=1, waited_s=0.0, place=0, nodes=1)
    pool.rollout.scale(2, 1)
    pool.act()
    assert pool.take_told() == [Release(2)]
    assert pool.act() == []  # one at a time for each that is too many
    pool.say(2, "busy", running=1)
    assert pool.take_told() == [Release(3)]  # the youngest of those not asked yet
    pool.say(3, "busy", running=1)
    assert pool.take_told() == [Release(1)]
    pool.state(1, "DRAINING", "a")
    assert pool.size == 3  # it still counts
    pool.die(1)
    assert (pool.size, pool.take_told()) == (2, [])
    assert pool.status is not None
    assert (pool.status.state, pool.status.wanted) == (HEALTHY, 2)


def test_a_replica_that_is_still_constructed_when_it_is_not_wanted_any_more_is_stopped() -> None:
    pool = scaled(1)
    pool.rollout.scale(2, 1)
    assert Resize(2) in pool.act()
    pool.state(2, "STARTING", "a")
    pool.rollout.scale(1, 1)
    pool.act()
    assert pool.take_told() == [Stop(2)]


def test_a_scaled_deployment_is_healthy_with_as_many_as_it_must_have() -> None:
    pool = scaled(1)
    pool.rollout.scale(4, 1)
    pool.act()
    assert pool.status is not None
    assert (pool.status.state, pool.status.wanted, pool.status.ready) == (HEALTHY, 4, 1)
    pool.deploy(2, "b", by=1, autoscaling={"min_replicas": 1, "max_replicas": 8})
    assert pool.status.generation == 1  # the new revision is not there yet


# Options


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"autoscaling_config": {"min_replicas": -1}}, "min_replicas"),
        ({"autoscaling_config": {"min_replicas": 3, "max_replicas": 2}}, "is below min_replicas"),
        ({"autoscaling_config": {"initial_replicas": 2}}, "initial_replicas"),
        ({"autoscaling_config": {"min_replicas": 2, "max_replicas": 3, "initial_replicas": 1}}, "initial_replicas"),
        ({"autoscaling_config": {"min_replicas": 0, "max_replicas": 0}}, "max_replicas"),
        ({"autoscaling_config": {"target_ongoing_requests": 0}}, "target_ongoing_requests"),
        ({"autoscaling_config": {"upscale_delay_s": -1}}, "upscale_delay_s"),
        ({"autoscaling_config": {"downscale_delay_s": -1}}, "downscale_delay_s"),
        ({"autoscaling_config": {"max_wait_s": 0}}, "max_wait_s"),
        ({"autoscaling_config": {"maximum": 2}}, "maximum"),
        ({"autoscaling_config": 3}, "autoscaling_config"),
        ({"autoscaling_config": {}, "num_replicas": 2}, "exclude each other"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        serve.deployment(**options)  # type: ignore[call-overload]


def test_num_replicas_ends_autoscaling_and_the_reverse() -> None:
    scaled = serve.deployment(name="f", autoscaling_config={"max_replicas": 4})(lambda: None)
    fixed = scaled.options(num_replicas=3)
    assert (fixed.num_replicas, fixed.autoscaling_config) == (3, None)
    assert fixed.options(autoscaling_config={"max_replicas": 2}).num_replicas == 1


def test_a_moment_of_few_calls_begins_no_time_that_later_ones_are_added_to() -> None:
    worker = Clock(Autoscaling(1, 8, target_ongoing_requests=2, upscale_delay_s=5, downscale_delay_s=30))
    assert worker.pass_seconds(6, calls=8) == 4
    assert worker.pass_seconds(1, calls=0) == 4
    assert {worker.pass_seconds(1, calls=8) for _ in range(60)} == {4}
    assert worker.pass_seconds(5, calls=0) == 4  # five seconds are not thirty
