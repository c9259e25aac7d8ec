"""What a worker decides about its replicas: births, deaths and reports in, actions out; no process is needed."""

import os
import select
import typing
from typing import Any

import msgspec
import pytest

from qserve.wire.autoscaling import Autoscaling
from qserve.wire.spec import DEPLOY_FAILED, DEPLOYING, HEALTHY
from qserve_workers.pool.rollout import KILL_MARGIN_S, Kill, Serve, Status, Stop
from qserve_workers.replica.replica_events import (
    CallsCounted,
    ChangeApplied,
    ConstructionFailed,
    DeletionSeen,
    DemandMeasured,
    DeploymentSeen,
    EventWriter,
    HealthLost,
    ReconfigureFailed,
    ReplicaEvent,
    StateEntered,
    StillBusy,
    TurnWanted,
    decode_event,
)
from tests.support.rollout_pool import Pool


def serving(n: int, *, exact: bool = False, **facts: Any) -> Pool:
    """A pool whose n replicas serve revision "a", generation 1."""
    pool = Pool(n, exact=exact)
    pool.deploy(1, "a", by=1, num_replicas=n, **facts)
    for pid in range(1, n + 1):
        pool.state(pid, "STARTING", "a")
        pool.state(pid, "SERVING", "a")
    assert pool.status == Status(1, HEALTHY, n, n)
    pool.take_told()
    return pool


def test_a_worker_is_healthy_once_all_its_replicas_serve() -> None:
    pool = Pool(2)
    pool.deploy(1, "a", by=1)
    pool.state(1, "SERVING", "a")
    assert pool.status == Status(0, DEPLOYING, 2, 1)
    pool.state(2, "SERVING", "a")
    assert pool.status == Status(1, HEALTHY, 2, 2)


def test_a_new_revision_is_constructed_first_and_serves_when_its_predecessor_has_gone() -> None:
    pool = serving(2)
    pool.deploy(2, "b", by=1)
    assert pool.pids == {1, 2, 3}
    assert pool.rollout.crew.by_pid[3].standby
    pool.state(3, "STARTING", "b", 2)
    assert pool.take_told() == []
    pool.state(3, "STANDBY", "b", 2)
    assert pool.take_told() == [Stop(1)]
    pool.die(1)
    assert pool.take_told() == [Serve(3)]
    assert pool.pids == {2, 3}  # the next one starts when this one serves
    pool.state(3, "SERVING", "b", 2)
    assert pool.pids == {2, 3, 4}
    pool.state(4, "STANDBY", "b", 2)
    pool.die(2)
    pool.state(4, "SERVING", "b", 2)
    assert pool.status == Status(2, HEALTHY, 2, 2)
    assert pool.size == 2


def ranks(pool: Pool) -> dict[int, int]:
    return {pid: replica.rank for pid, replica in pool.rollout.crew.by_pid.items()}


def test_each_version_counts_its_replicas_from_zero_and_a_successor_takes_the_number_that_is_free() -> None:
    pool = serving(3)
    assert ranks(pool) == {1: 0, 2: 1, 3: 2}
    pool.die(2, "signal SIGKILL")
    assert ranks(pool) == {1: 0, 3: 2, 4: 1}
    pool.state(4, "SERVING", "a")

    pool.deploy(2, "b", by=1)
    for old, new in ((1, 5), (3, 6), (4, 7)):
        pool.state(new, "STANDBY", "b", 2)
        pool.die(old)
        pool.state(new, "SERVING", "b", 2)
    assert ranks(pool) == {5: 0, 6: 1, 7: 2}


def test_a_deploy_is_given_up_after_as_many_failures_as_it_allows() -> None:
    pool = Pool(2)
    pool.deploy(1, "a", by=1, most_failures=2)
    pool.say(1, "failed", generation=1, revision="a", error="first")
    assert pool.status == Status(0, DEPLOYING, 2, 0, "first")
    pool.say(2, "failed", generation=1, revision="a", error="second")
    assert pool.status == Status(1, DEPLOY_FAILED, 2, 0, "second")


def test_a_replica_that_is_ill_serves_until_another_one_can() -> None:
    pool = serving(2)
    pool.say(1, "ill", error="no connection")
    assert pool.status == Status(1, DEPLOYING, 2, 1, "A replica is replaced: no connection")
    assert pool.pids == {1, 2, 3}
    assert pool.take_told() == []
    pool.state(3, "STARTING", "a")
    pool.state(3, "STANDBY", "a")
    assert pool.take_told() == [Stop(1)]
    pool.die(1)
    assert pool.take_told() == [Serve(3)]
    pool.state(3, "SERVING", "a")
    assert pool.pids == {2, 3}
    assert pool.status == Status(1, HEALTHY, 2, 2)


def test_a_replica_that_is_ill_serves_on_while_constructors_fail() -> None:
    pool = serving(1)
    pool.say(1, "ill", error="no connection")
    for pid in range(2, 8):
        pool.state(pid, "STARTING", "a")
        pool.say(pid, "failed", generation=1, revision="a", error="no connection either")
        pool.die(pid)
    assert pool.pids == {1, 8}
    assert pool.take_told() == []


def test_a_replica_that_is_ill_leaves_first_where_there_is_no_room_for_two() -> None:
    pool = serving(1, surge=False)
    pool.say(1, "ill", error="no connection")
    assert pool.take_told() == [Stop(1)]
    pool.die(1)
    assert pool.pids == {2}


def test_at_most_a_fifth_of_the_replicas_changes_at_a_time() -> None:
    pool = serving(10)
    pool.deploy(2, "b", by=1)
    assert pool.pids == set(range(1, 13))


def test_without_surge_the_old_replica_goes_first() -> None:
    pool = serving(2, surge=False)
    pool.deploy(2, "b", by=1, surge=False)
    assert pool.take_told() == [Stop(1)]
    assert pool.pids == {1, 2}
    pool.die(1)
    assert pool.pids == {2, 3}
    assert not pool.rollout.crew.by_pid[3].standby
    assert pool.take_told() == []
    pool.state(3, "STARTING", "b", 2)
    assert pool.take_told() == []
    pool.state(3, "SERVING", "b", 2)
    assert pool.take_told() == [Stop(2)]


def test_a_broken_revision_removes_nothing_and_is_given_up_after_three_attempts_per_replica() -> None:
    pool = serving(1)
    pool.deploy(2, "b", by=1)
    for pid in (2, 3, 4):
        assert pool.failures[pid] == pid - 2
        pool.state(pid, "STARTING", "b", 2)
        pool.say(pid, "failed", generation=2, revision="b", error="ZeroDivisionError")
        pool.die(pid)
    assert pool.status == Status(2, DEPLOY_FAILED, 1, 0, "ZeroDivisionError")
    assert pool.pids == {1}
    assert pool.take_told() == []


def test_going_back_to_the_old_revision_replaces_nothing() -> None:
    pool = serving(2)
    pool.deploy(2, "b", by=1)
    pool.state(3, "STARTING", "b", 2)
    pool.deploy(3, "a", by=1)
    assert pool.take_told() == [Stop(3)]
    pool.die(3)
    pool.say(1, "applied", generation=3)
    pool.say(2, "applied", generation=3)
    assert pool.status == Status(3, HEALTHY, 2, 2)
    assert pool.pids == {1, 2}


def test_once_a_replica_is_up_the_others_are_tried_again_for_ever() -> None:
    pool = Pool(2)
    pool.deploy(1, "a", by=1)
    pool.state(1, "SERVING", "a")
    for pid in range(2, 20):
        pool.state(pid, "STARTING", "a")
        pool.say(pid, "failed", generation=1, revision="a", error="busy")
        pool.die(pid)
    assert pool.status == Status(0, DEPLOYING, 2, 1, "busy")
    pool.state(20, "SERVING", "a")
    assert pool.status == Status(1, HEALTHY, 2, 2)


def crash(pool: Pool, times: int, *, after_s: float = 0.0, calls: int = 0) -> list[int]:
    """The newest replica comes up and dies, again and again; as after how many failures its successors wait."""
    waits = []
    for _ in range(times):
        pid = max(pool.pids)
        pool.state(pid, "SERVING", "a")
        if calls:
            pool.say(pid, "stats", running=1, handled=calls)
        pool.now += after_s
        pool.die(pid, "exit code 3")
        waits.append(pool.failures[max(pool.pids)])
    return waits


def test_replicas_that_die_as_soon_as_they_are_up_are_replaced_ever_more_slowly() -> None:
    pool = serving(2)
    assert crash(pool, 8) == [0, 0, 0, 0, 0, 0, 1, 2]
    pool.deploy(2, "b", by=1)  # whoever waits tries it at once, and so do those that come
    pool.die(max(pool.pids))
    assert pool.failures[max(pool.pids)] == 0


@pytest.mark.parametrize("of_use", [{"after_s": 11.0}, {"calls": 1}])
def test_replicas_that_were_of_use_before_they_died_are_replaced_at_once(of_use: dict[str, Any]) -> None:
    pool = serving(1)
    assert crash(pool, 5) == [0, 0, 0, 1, 2]
    assert crash(pool, 6, **of_use) == [0] * 6
    assert crash(pool, 4) == [0, 0, 0, 1]


def test_replicas_that_are_told_to_leave_have_not_crashed() -> None:
    pool = serving(1)
    for _ in range(6):
        pid = max(pool.pids)
        pool.state(pid, "SERVING", "a")
        pool.rollout.stop(pid, pool.now)
        pool.act()
        pool.die(pid)
        assert pool.failures[max(pool.pids)] == 0


def test_replicas_that_fall_ill_as_soon_as_they_are_up_are_replaced_ever_more_slowly() -> None:
    pool = serving(1)
    waits = []
    for _ in range(5):
        ill = max(pool.pids)
        pool.say(ill, "ill", error="no connection")
        fresh = max(pool.pids)
        waits.append(pool.failures[fresh])
        pool.state(fresh, "STANDBY", "a")
        pool.die(ill)
        pool.state(fresh, "SERVING", "a")
    assert waits == [0, 0, 0, 1, 2]


def test_a_first_deploy_that_fails_leaves_one_process_which_waits_and_tries() -> None:
    pool = Pool(2)
    pool.deploy(1, "a", by=1)
    for pid in range(1, 7):
        pool.state(pid, "STARTING", "a")
        pool.say(pid, "failed", generation=1, revision="a", error="busy")
        pool.die(pid)
    assert pool.status is not None
    assert pool.status.state == DEPLOY_FAILED
    for pid in sorted(pool.pids)[1:]:
        pool.say(pid, "failed", generation=1, revision="a", error="busy")
        pool.die(pid)
    assert len(pool.pids) == 1
    pool.deploy(2, "b", by=min(pool.pids))
    assert len(pool.pids) == 2


def test_a_replica_that_dies_while_constructing_counts_as_a_failure() -> None:
    pool = Pool(1)
    pool.deploy(1, "a", by=1)
    for pid in (1, 2, 3):
        pool.state(pid, "STARTING", "a")
        pool.die(pid, "signal SIGSEGV")
    assert pool.status is not None
    assert pool.status.state == DEPLOY_FAILED
    assert "signal SIGSEGV" in pool.status.error


def test_a_replica_that_is_told_to_leave_by_its_own_constructor_counts_as_a_failure() -> None:
    pool = Pool(1)
    pool.deploy(1, "a", by=1)
    for pid in (1, 2, 3):
        pool.state(pid, "STARTING", "a")
        pool.state(pid, "DRAINING", "a")
        pool.die(pid, "exit code 0")
    assert pool.status is not None
    assert pool.status.state == DEPLOY_FAILED
    assert "SIGTERM while it constructed" in pool.status.error


def test_a_dead_replica_is_replaced() -> None:
    pool = serving(2)
    pool.die(1, "signal SIGKILL")
    assert pool.status == Status(1, DEPLOYING, 2, 1)
    assert pool.pids == {2, 3}
    assert not pool.rollout.crew.by_pid[3].standby


def test_a_newer_deploy_takes_the_place_of_a_rollout() -> None:
    pool = serving(1)
    pool.deploy(2, "b", by=1)
    pool.state(2, "STARTING", "b", 2)
    pool.deploy(3, "c", by=1)
    assert pool.take_told() == [Stop(2)]
    assert pool.pids == {1, 2, 3}
    pool.die(2)
    pool.state(3, "STANDBY", "c", 3)
    assert pool.take_told() == [Stop(1)]
    pool.die(1)
    assert pool.take_told() == [Serve(3)]


def test_a_standby_whose_predecessor_left_still_serves_when_a_newer_deploy_comes() -> None:
    pool = serving(1)
    pool.deploy(2, "b", by=1)
    pool.state(2, "STANDBY", "b", 2)
    assert pool.take_told() == [Stop(1)]
    pool.deploy(3, "c", by=2)
    pool.die(1)
    assert pool.take_told() == [Serve(2)]
    pool.state(2, "SERVING", "b", 2)
    pool.state(3, "STANDBY", "c", 3)
    assert pool.take_told() == [Stop(2)]


def test_a_new_replica_that_dies_before_its_turn_leaves_the_next_one_to_wait_for_the_old() -> None:
    pool = serving(1)
    pool.deploy(2, "b", by=1)
    pool.state(2, "STANDBY", "b", 2)
    pool.die(2, "signal SIGKILL")
    pool.take_told()
    pool.state(3, "STANDBY", "b", 2)
    assert pool.take_told() == []
    pool.die(1)
    assert pool.take_told() == [Serve(3)]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_exact_mode_follows_num_replicas(before: int, after: int) -> None:
    pool = serving(before, exact=True)
    pool.deploy(2, "a", by=1, num_replicas=after)
    for pid in sorted(pool.pids):
        pool.say(pid, "applied", generation=2)
        pool.state(pid, "SERVING", "a", 2) if pid > before else None
    for action in pool.take_told():
        assert isinstance(action, Stop)
        assert action.pid != 1  # the oldest is the warmest
        pool.die(action.pid)
    assert pool.status == Status(2, HEALTHY, after, after)
    assert len(pool.pids) == after


@pytest.mark.parametrize(("before", "after"), [(1, 3), (4, 1), (2, 5)])
def test_a_new_revision_with_another_num_replicas_ends_with_exactly_that_many_new_ones(before: int, after: int) -> None:
    pool = serving(before, exact=True)
    pool.deploy(2, "b", by=1, num_replicas=after)
    for _ in range(30):
        for pid, replica in list(pool.rollout.crew.by_pid.items()):
            if pid > before and replica.state == "":
                pool.state(pid, "STANDBY" if replica.standby else "SERVING", "b", 2)
        for action in pool.take_told():
            if isinstance(action, Stop):
                pool.die(action.pid)
            elif isinstance(action, Serve):
                pool.state(action.pid, "SERVING", "b", 2)
    assert pool.status == Status(2, HEALTHY, after, after)
    assert len(pool.pids) == after
    assert min(pool.pids) > before


def test_an_update_of_the_same_revision_is_done_when_all_have_applied_it() -> None:
    pool = serving(2)
    pool.deploy(2, "a", by=1)
    assert pool.status == Status(1, DEPLOYING, 2, 0)
    pool.say(1, "applied", generation=2)
    pool.say(2, "applied", generation=2)
    assert pool.status == Status(2, HEALTHY, 2, 2)
    assert pool.take_told() == []


def test_replicas_reconfigure_in_turns() -> None:
    pool = serving(3)
    pool.deploy(2, "a", by=1)
    for pid in (1, 2, 3):
        pool.say(pid, "asks_to_apply", generation=2)
    assert pool.take_told() == [Serve(1)]
    pool.say(1, "applied", generation=2)
    assert pool.take_told() == [Serve(2)]
    pool.die(2)
    assert pool.take_told() == [Serve(3)]
    pool.say(3, "reconfigure_failed", generation=2, error="ValueError: no")
    pool.say(1, "asks_to_apply", generation=2)
    assert pool.take_told() == []


def test_a_refused_reconfiguration_fails_the_deploy_until_the_next_one() -> None:
    pool = serving(1)
    pool.deploy(2, "a", by=1)
    pool.say(1, "reconfigure_failed", generation=2, error="ValueError: no")
    assert pool.status == Status(2, DEPLOY_FAILED, 1, 0, "ValueError: no")
    pool.deploy(3, "a", by=1)
    pool.say(1, "applied", generation=3)
    assert pool.status == Status(3, HEALTHY, 1, 1)


def test_a_deleted_deployment_leaves_one_fresh_process_that_waits() -> None:
    pool = serving(2)
    pool.say(1, "deleted")
    assert pool.status is None
    assert pool.take_told() == [Stop(1), Stop(2)]
    pool.die(1)
    pool.die(2)
    assert pool.pids == {3}
    pool.deploy(1, "c", by=3)  # generations may begin again
    assert pool.pids == {3, 4}


def test_a_constructor_that_hangs_is_killed_and_counts_as_a_failure() -> None:
    pool = Pool(1)
    pool.deploy(1, "a", by=1, initialization_timeout=5.0)
    pool.state(1, "STARTING", "a")
    assert pool.rollout.next_deadline() == 5.0
    pool.now = 5.0
    pool.act()
    [killed] = pool.take_told()
    assert isinstance(killed, Kill)
    assert pool.status is not None
    assert "constructor took over 5 s" in pool.status.error
    assert pool.rollout.next_deadline() is None


def test_a_replica_that_still_constructs_gets_no_grace_period_for_calls() -> None:
    pool = Pool(1)
    pool.deploy(1, "a", by=1, graceful_timeout=20.0)
    pool.state(1, "STARTING", "a")
    pool.say(1, "deleted")
    assert pool.take_told() == [Stop(1)]
    pool.now = KILL_MARGIN_S
    pool.act()
    [killed] = pool.take_told()
    assert isinstance(killed, Kill)


def test_a_replica_that_does_not_leave_is_killed_after_its_own_grace_period() -> None:
    pool = serving(1, graceful_timeout=3.0)
    pool.deploy(2, "b", by=1, graceful_timeout=60.0)
    pool.state(2, "STANDBY", "b", 2)
    assert pool.take_told() == [Stop(1)]
    pool.now = 4.9
    pool.act()
    assert pool.take_told() == []
    pool.now = 5.0
    pool.act()
    [killed] = pool.take_told()
    assert isinstance(killed, Kill)
    assert killed.pid == 1


def test_a_stopped_replica_is_replaced_while_it_drains() -> None:
    pool = serving(2)
    assert pool.rollout.stop(1, 0.0)
    assert not pool.rollout.stop(1, 0.0)
    pool.act()
    assert pool.pids == {1, 2, 3}
    pool.state(3, "SERVING", "a")
    pool.die(1)
    assert pool.pids == {2, 3}
    assert pool.status == Status(1, HEALTHY, 2, 2)


def test_closing_stops_everyone_and_starts_no_one() -> None:
    pool = serving(2)
    pool.rollout.close()
    pool.act()
    assert pool.take_told() == [Stop(1), Stop(2)]
    pool.die(1)
    pool.die(2)
    assert pool.pids == set()


def test_events_of_unknown_processes_are_ignored() -> None:
    pool = serving(1)
    pool.say(99, "deployed", generation=9, revision="z")
    assert pool.status == Status(1, HEALTHY, 1, 1)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"}{",
        b'{"event":"sang","pid":1}',
        b'{"pid":1}',
        b'{"event":"applied","pid":1}',
        b'{"event":"applied","generation":"x"}',
    ],
)
def test_what_is_no_event_is_refused_whole(line: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_event(line)


EVENTS: list[ReplicaEvent] = [
    DeploymentSeen(generation=1, revision="a", autoscaling=Autoscaling(1, 2)),
    DeletionSeen(),
    StateEntered(state="SERVING", generation=1, revision="a"),
    ConstructionFailed(generation=1, revision="a", error="no model"),
    HealthLost(error="check_health has failed 3 times in a row"),
    TurnWanted(generation=2),
    ChangeApplied(generation=2),
    ReconfigureFailed(generation=2, error="no such config"),
    CallsCounted(running=1, handled=2),
    StillBusy(running=1),
    DemandMeasured(calls=1, waited_s=0.5, place=0, nodes=1, running=1),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_event_arrives_as_it_was_told_with_the_process_and_the_replica(event: ReplicaEvent) -> None:
    reader, writer = os.pipe()
    EventWriter(writer, "r1").tell(event)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        (line,) = told.readlines()
    assert decode_event(line) == msgspec.structs.replace(event, pid=os.getpid(), replica="r1")


def test_every_kind_of_event_is_among_those() -> None:
    assert {type(event) for event in EVENTS} == set(typing.get_args(ReplicaEvent))


def test_an_error_of_any_length_and_of_any_characters_leaves_in_one_atomic_write() -> None:
    reader, writer = os.pipe()
    for text in ("x" * 100_000, "\N{GRINNING FACE}" * 10_000, "\x00" * 10_000, "\udcff" * 10_000, '"' * 5000):
        EventWriter(writer, "r" * 32).tell(ConstructionFailed(generation=1, revision="a" * 64, error=text + "the end"))
        line = os.read(reader, 65_536)
        assert len(line) <= select.PIPE_BUF
        event = decode_event(line)
        assert isinstance(event, ConstructionFailed)
        assert event.error.endswith("the end")
