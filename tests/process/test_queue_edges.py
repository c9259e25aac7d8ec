"""The scripts of queues at their edges: who is blamed, what is found, what is bounded, and what may sleep."""

from typing import Any

import pytest
import redis

from qserve.broker.instance.heartbeats import LEFT
from qserve.broker.keys import GROUP
from qserve.broker.scripts import FIND, GIVE_UP, LEASE, RELEASE, SLEEP
from tests.support.echo_queue import ALIVE, BEATS, INBOX, KEYS, LETTERS, META, STREAM, Queue


@pytest.fixture
def queue(redis_client: "redis.Redis") -> Queue:
    queue = Queue(redis_client)
    queue.deploy(1000)
    return queue


def test_a_call_that_was_handed_back_and_only_waited_is_not_blamed_for_a_death(queue: Queue) -> None:
    queue.put("a", flags="s")
    (entry,) = queue.read("A")
    queue.redis.xclaim(STREAM, GROUP, "A", 0, [entry], retrycount=3)  # its second start was noted, and never happened
    queue.redis.hset(BEATS, "A", LEFT)
    queue.beat("B")
    assert queue.take("A", "B") == [(2, entry)]
    queue.die("B")
    assert queue.take("B", "C") == [(2, entry)]


def test_a_call_is_found_behind_many_others(queue: Queue) -> None:
    _, _, *entries = queue.put(*map(str, range(130)))
    assert queue.run(FIND, (STREAM,), 60_000, "0", "nowhere", "129") == [entries[0], None, entries[129]]


def test_dead_letters_are_bounded(queue: Queue) -> None:
    _, _, *entries = queue.put(*map(str, range(500)))
    queue.read("A", 500)
    for entry in entries:
        queue.run(GIVE_UP, (STREAM, LETTERS, INBOX, ALIVE), GROUP, entry, "too bad", 100, "", 60_000)
    assert queue.redis.xlen(LETTERS) < 250


def test_a_lease_has_one_holder_and_only_that_gives_it_back(queue: Queue) -> None:
    def ask(script: Any, who: str, *more: Any) -> int:
        return int(queue.run(script, ("test-lease",), who, *more))

    assert [ask(LEASE, "A", 60_000), ask(LEASE, "B", 60_000), ask(LEASE, "A", 60_000)] == [1, 0, 1]
    assert [ask(RELEASE, "B"), ask(LEASE, "B", 60_000), ask(RELEASE, "A"), ask(LEASE, "B", 60_000)] == [0, 0, 1, 1]


class TestSleeping:
    @pytest.fixture
    def idle(self, queue: Queue) -> Queue:
        queue.redis.hset(META, mapping={"gen": 1, "spec": "x", "state": "HEALTHY"})
        return queue

    @staticmethod
    def sleep(queue: Queue, ever: int = 0) -> int:
        keys = (META, STREAM, KEYS.low("Echo"), KEYS.due("Echo"))
        return int(queue.run(SLEEP, keys, "1", ever, 5000))

    def test_what_nobody_needs_sleeps(self, idle: Queue) -> None:
        assert self.sleep(idle) == 1

    def test_not_while_a_call_waits_or_has_come_since(self, idle: Queue) -> None:
        idle.put("a")
        assert self.sleep(idle, 1) == 0
        idle.reply((idle.read("A")[0], "done"))
        assert [self.sleep(idle, 0), self.sleep(idle, 1)] == [0, 1]

    def test_not_while_a_durable_call_waits_or_is_due_soon(self, idle: Queue) -> None:
        idle.redis.zadd(KEYS.low("Echo"), {"d": 1})
        assert self.sleep(idle) == 0
        idle.redis.delete(KEYS.low("Echo"))
        seconds, _ = idle.redis.time()
        idle.redis.zadd(KEYS.due("Echo"), {"d": seconds * 1000 + 2000})
        assert self.sleep(idle) == 0
        idle.redis.zadd(KEYS.due("Echo"), {"d": seconds * 1000 + 60_000})
        assert self.sleep(idle) == 1
