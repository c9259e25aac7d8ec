"""The scripts that hand over calls: to whom, and what counts as started."""

from typing import cast

import pytest
import redis

from qserve.broker.scripts import HOLD_MODELS
from tests.support.echo_queue import KEYS, MODELS, Queue


@pytest.fixture
def queue(redis_client: "redis.Redis") -> Queue:
    """A deployment with the replicas A, B and C, which have calls in their hands."""
    queue = Queue(redis_client)
    queue.deploy(max_queued=100)
    for replica in "ABC":
        queue.beat(replica)
    return queue


def hold(queue: Queue, replica: str, room: int, *models: str) -> None:
    queue.run(HOLD_MODELS, (MODELS,), replica, room, *(part for model in models for part in (model, "1")))


def holders(queue: Queue, model: str) -> list[str]:
    return (cast("bytes | None", queue.redis.hget(MODELS, f"m:{model}")) or b"").decode().split()


def test_a_call_goes_to_the_replica_that_holds_its_model(queue: Queue) -> None:
    hold(queue, "B", 0, "lion")
    queue.put("call")
    (entry,) = queue.read("A")

    assert queue.hand_over(entry, "A", "", model="lion") == b"B"
    assert queue.hand_over(entry, "A", "C", model="lion") == b"B"
    assert queue.hand_over(entry, "A", "B", model="lion") == 1

    assert queue.pending("A") == []
    assert queue.pending("B") == [entry]
    assert queue.redis.xlen(KEYS.inbox("B")) == 1
    assert queue.hand_over(entry, "A", "B", model="lion") == -1


def test_who_is_told_to_run_it_counts_as_a_holder(queue: Queue) -> None:
    queue.put("first", "second")
    first, second = queue.read("A", 1) + queue.read("B", 1)

    assert queue.hand_over(first, "A", "", model="lion", room=3) == 0
    assert queue.hand_over(second, "B", "", model="lion", room=3) == b"A"


def test_a_new_model_goes_where_there_is_room_for_it(queue: Queue) -> None:
    hold(queue, "A", 0, "lion")
    hold(queue, "B", 0, "bear")
    hold(queue, "C", 2, "wolf")
    queue.put("a", "b", "c")
    entries = queue.read("A")

    given = [queue.hand_over(each, "A", "C", model=each.decode(), room=0) for each in entries]

    assert given == [1, 1, 0]  # the last one replaces another model, wherever it runs
    assert [holders(queue, each.decode()) for each in entries] == [["C"], ["C"], ["A"]]


def test_a_replica_that_has_much_to_do_already_is_spared(queue: Queue) -> None:
    hold(queue, "B", 0, "lion")
    queue.put(*map(str, range(17)))
    queue.read("B", 16)
    (entry,) = queue.read("A")

    assert queue.hand_over(entry, "A", "B", model="lion") == 0
    assert holders(queue, "lion") == ["B", "A"]


@pytest.mark.parametrize("fate", ["dead", "left"])
def test_nothing_is_given_to_a_replica_that_is_gone(queue: Queue, fate: str) -> None:
    hold(queue, "B", 0, "lion")
    queue.redis.hset(KEYS.heartbeats("Echo"), "B", fate)
    queue.put("call")
    (entry,) = queue.read("A")

    assert queue.hand_over(entry, "A", "B", model="lion") == 0
    assert queue.hand_over(entry, "A", "B") == 0
    assert queue.pending("A") == [entry]


def test_a_call_that_was_handed_over_and_not_started_is_like_a_new_one(queue: Queue) -> None:
    queue.put("call")
    (entry,) = queue.read("A")
    queue.hand_over(entry, "A", "B")
    queue.die("B")

    assert queue.take("B", "C") == [(1, entry)]
    queue.die("C")
    assert queue.take("C", "A") == [(2, entry)]


def test_one_that_was_started_counts(queue: Queue) -> None:
    queue.put("call")
    (entry,) = queue.read("A")
    queue.hand_over(entry, "A", "B")

    assert queue.adopt("B", entry)
    assert not queue.adopt("B", entry)
    assert not queue.adopt("A", entry)
    queue.die("B")
    assert queue.take("B", "C") == [(2, entry)]


def test_a_replica_that_is_gone_for_good_holds_nothing(queue: Queue) -> None:
    hold(queue, "A", 2, "lion", "bear")
    hold(queue, "B", 2, "lion")
    assert queue.retire("A")

    assert (holders(queue, "lion"), holders(queue, "bear")) == (["B"], [])
    assert queue.retire("B")
    assert not queue.redis.exists(MODELS)
