"""A queue as a replica sees it over its own connection: what is there, what is its own, and who has died."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import redis

from qserve.broker.connection import Connection
from qserve.broker.keys import GROUP
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.replica_queue import ReplicaQueue
from tests.support.chosen_server import needs_one_server
from tests.support.echo_queue import BEATS, KEYS, STREAM, Queue

pytestmark = needs_one_server


@pytest.fixture
async def connection(redis_server: str, redis_client: "redis.Redis") -> AsyncIterator[Connection]:
    connection = await Connection.open(redis_server)
    yield connection
    connection.close()


@pytest.fixture
async def me(connection: Connection) -> ReplicaQueue:
    queue = ReplicaQueue(KEYS, "Echo", "A")
    await queue.open(connection)
    return queue


@pytest.fixture
def queue(redis_client: "redis.Redis") -> Queue:
    queue = Queue(redis_client)
    redis_client.hset(KEYS.meta("Echo"), "max_queued", 10)
    return queue


async def test_the_group_is_made_where_it_is_missing_and_begins_with_the_first_call(
    connection: Connection, queue: Queue
) -> None:
    queue.redis.xadd(STREAM, {"r": "before", "f": "", "d": "before"})
    for _ in range(2):
        await ReplicaQueue(KEYS, "Echo", "A").open(connection)
    assert len(queue.read("A")) == 1


async def test_replicas_that_come_at_the_same_moment_make_one_group(connection: Connection, queue: Queue) -> None:
    await asyncio.gather(*(ReplicaQueue(KEYS, "Echo", name).open(connection) for name in "ABC"))
    queue.put("a")
    assert len(queue.read("A")) == 1
    assert queue.read("B") == []


async def test_a_key_that_is_no_queue_is_refused(connection: Connection, redis_client: "redis.Redis") -> None:
    redis_client.set(STREAM, "x")
    with pytest.raises(CommandRefused, match="WRONGTYPE"):
        await ReplicaQueue(KEYS, "Echo", "A").open(connection)


async def test_unread_calls_are_those_that_nobody_has_been_given(
    connection: Connection, me: ReplicaQueue, queue: Queue, redis_client: "redis.Redis"
) -> None:
    queue.put("first", "second", "third")
    queue.read("A", 1)
    assert [entry.frame for entry in await me.unread(connection, 10)] == [b"second", b"third"]
    assert [entry.frame for entry in await me.unread(connection, 1)] == [b"second"]
    redis_client.xgroup_destroy(STREAM, GROUP)
    assert await me.unread(connection, 10) == []


async def test_the_history_is_what_this_replica_has_and_has_not_answered(
    connection: Connection, me: ReplicaQueue, queue: Queue
) -> None:
    queue.put("mine", "answered", "theirs")
    mine, answered = queue.read("A", 2)
    queue.read("B")
    queue.reply((answered, "done"))
    assert [(entry.id, entry.deliveries) for entry in await me.history(connection)] == [(mine, 1)]
    assert me.entries(None) == []
    assert await me.length(connection) == 2


async def test_the_history_is_without_what_others_take_while_it_is_read(
    connection: Connection, me: ReplicaQueue, queue: Queue
) -> None:
    """Calls that were handed over to this replica, and not started, are anyone's for the taking."""
    queue.put("mine", "lost")
    mine, lost = queue.read("A", 2)
    queue.redis.xclaim(STREAM, GROUP, "A", 0, [mine, lost], retrycount=0)
    history = asyncio.ensure_future(me.history(connection))
    await asyncio.sleep(0)
    await connection.call("XCLAIM", STREAM, GROUP, "B", 0, lost)
    assert [(entry.id, entry.frame) for entry in await history] == [(mine, b"mine")]


async def test_a_replica_with_calls_and_no_heartbeat_gets_one_that_never_moves(
    connection: Connection, me: ReplicaQueue, queue: Queue, redis_client: "redis.Redis"
) -> None:
    queue.put("a", "b")
    queue.read("orphan", 1)
    queue.read("alive", 1)
    redis_client.xgroup_createconsumer(STREAM, GROUP, "idle")
    queue.beat("alive")
    beat = redis_client.hget(BEATS, "alive")
    await me.adopt_orphans(connection)
    assert await me.heartbeats(connection) == {"alive": beat, "orphan": b"0"}


async def test_workers_that_no_longer_say_that_they_live_are_named_until_they_are_forgotten(
    connection: Connection, me: ReplicaQueue, redis_client: "redis.Redis"
) -> None:
    redis_client.hset(KEYS.workers("Echo"), mapping={"here": "x", "gone": "x"})
    redis_client.set(KEYS.alive("here"), "1")
    assert await me.silent_workers(connection) == ["gone"]
    await me.forget_worker(connection, "gone")
    assert await me.silent_workers(connection) == []


async def test_nothing_is_from_before_while_the_server_is_the_same(connection: Connection, me: ReplicaQueue) -> None:
    assert await me.last_from_before(connection) is None
    assert await me.last_from_before(connection) is None


async def test_a_replica_is_forgotten_once_nothing_is_pending_for_it(
    connection: Connection, me: ReplicaQueue, queue: Queue
) -> None:
    queue.put("a")
    (entry,) = queue.read("B")
    queue.beat("B", entry)
    assert not await me.retire(connection, "B")
    queue.reply((entry, "done"))
    assert await me.retire(connection, "B")
    assert await me.heartbeats(connection) == {}
