"""Lanes: what shards of one server have of the connection that they share."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from qserve.broker.connection import Answer, Connection
from qserve.broker.keys import Keys
from qserve.broker.lanes.end_of_tick import EndOfTick
from qserve.broker.lanes.lane import Lane
from qserve.broker.lanes.lines import Lines
from qserve.broker.redis_errors import NotTaken
from qserve.broker.server.address import SHARDS, parse
from qserve.errors import BrokerUnavailable
from tests.support.serving import free_port
from tests.support.slowness import patience

MOVED = ("EVAL", "return redis.error_reply('MOVED 7 127.0.0.1:1')", 0)


class Two:
    """Two lanes of one connection, and what they were told."""

    def __init__(self, line: Connection) -> None:
        self.told: list[str] = []
        self.line = line
        self.one = Lane(line, lambda _: self.told.append("one left"), lambda: self.told.append("one lost"))
        self.two = Lane(line, lambda _: self.told.append("two left"), lambda: self.told.append("two lost"))


@pytest.fixture
async def lanes(redis_server: str) -> AsyncIterator[Two]:
    def lost() -> None:
        found.one.line_lost()
        found.two.line_lost()

    broker = parse(redis_server)
    broker = broker.at(broker.nodes[0]) if broker.nodes else broker
    line = await Connection(lost, lambda: None).open_at(broker, patience(5))
    found = Two(line)
    yield found
    line.close()


async def test_each_lane_gets_the_answers_to_its_own_commands(lanes: Two) -> None:
    one: list[Answer] = []
    two: list[Answer] = []
    for number in range(100):
        lanes.one.send(one.append, "ECHO", number)
        lanes.two.send(two.append, "ECHO", -number)
    assert (lanes.one.is_idle, lanes.two.is_idle) == (False, False)

    await lanes.line.call("PING")

    assert (one, two) == ([b"%d" % n for n in range(100)], [b"%d" % -n for n in range(100)])
    assert (lanes.one.is_idle, lanes.two.is_idle) == (True, True)


async def test_a_command_that_cannot_be_packed_shifts_nobodys_answers(lanes: Two) -> None:
    with pytest.raises(UnicodeEncodeError):
        await lanes.one.call("ECHO", "\ud800")
    one, two = await asyncio.gather(lanes.one.call("ECHO", 1), lanes.two.call("ECHO", 2))
    assert (one, two) == (b"1", b"2")


async def test_where_one_shard_has_moved_the_others_stay(lanes: Two) -> None:
    answers: list[Answer] = []
    lanes.one.send(answers.append, *MOVED)
    lanes.one.send(answers.append, "ECHO", "owed")

    assert await lanes.two.call("ECHO", "stays") == b"stays"

    assert [type(answers[0]), answers[1]] == [NotTaken, b"owed"]
    await asyncio.sleep(0)
    assert (lanes.one.is_open, lanes.two.is_open) == (False, True)
    assert await lanes.two.call("ECHO", "still") == b"still"
    assert lanes.told == ["one lost", "one left"]


async def test_a_lane_that_is_closed_takes_nothing_from_the_others(lanes: Two) -> None:
    answers: list[Answer] = []
    lanes.one.send(answers.append, "ECHO", "1")
    after = asyncio.ensure_future(lanes.two.call("ECHO", "2"))
    await asyncio.sleep(0)
    lanes.one.close()

    assert await after == b"2"
    assert [type(answer) for answer in answers] == [BrokerUnavailable]
    assert lanes.told == ["one left"]
    with pytest.raises(BrokerUnavailable):
        await lanes.one.call("PING")


async def test_the_loss_of_the_connection_is_told_to_every_lane(lanes: Two) -> None:
    answers: list[Answer] = []
    lanes.one.send(answers.append, "ECHO", "1")
    lanes.two.send(answers.append, "ECHO", "2")

    lanes.one.give_up()

    assert [type(answer) for answer in answers] == [BrokerUnavailable, BrokerUnavailable]
    assert sorted(lanes.told) == ["one left", "one lost", "two left", "two lost"]
    assert (lanes.one.is_open, lanes.two.is_open) == (False, False)


async def test_reads_leave_with_the_calls_of_their_tick(lanes: Two) -> None:
    tick = EndOfTick()
    seen: list[bool] = []

    def put() -> Connection:
        lanes.two.send(lambda _: None, "PING")
        return lanes.two

    tick.read(lambda: seen.append(lanes.one.has_unsent))
    tick.put(put)
    await lanes.one.call("PING")
    tick.read(lambda: seen.append(lanes.one.has_unsent))
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert seen == [True, False]


async def test_a_lane_to_a_cluster_that_is_gone_says_what_was_tried() -> None:
    nowhere = Keys("test", SHARDS).of("Echo").address(f"redis+cluster://127.0.0.1:{free_port()}")
    with pytest.raises(BrokerUnavailable, match=r"found nothing to connect to .* \(cluster 127\..*\): node 127\."):
        await Lines().lane(nowhere)
