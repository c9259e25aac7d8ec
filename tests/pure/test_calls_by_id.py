"""Reading a durable call by its id: what is refused, and what is said while Redis is away."""

from typing import Any

import pytest

from qserve.broker.connection import Answer, Connection
from qserve.broker.keys import Keys
from qserve.broker.link import Link
from qserve.broker.records import durable_reply
from qserve.durable.by_id import CallsById
from qserve.errors import BrokerUnavailable, FrameRejected
from qserve.wire.call_record import PART, CallRecord, Part
from qserve.wire.messages import VALUE, Reply, Signer, encode
from tests.support.open_connection import OpenConnection

SIGNER = Signer((b"key",))
RECORD = CallRecord(
    *("d1", "running", "Echo", 0, "", 2, 0.0, 0.0, None, None, None, "", None, (), 3), has_parts=True, is_late=False
)


class Told:
    """The records of a server that has what a test says."""

    def __init__(self, *frames: bytes) -> None:
        self.frames = frames

    async def parts(self, *_: Any) -> list[tuple[int, float, bytes]]:
        return [(number, 0.0, frame) for number, frame in enumerate(self.frames, start=1)]


async def nothing() -> None:
    """What is to be done when there is a connection."""


def calls(*frames: bytes, is_open: bool = True) -> CallsById:
    link = Link("redis://nowhere", nothing)
    link.sender = OpenConnection() if is_open else Connection()
    records: Any = Told(*frames)
    return CallsById(records, Keys("test"), SIGNER, link)


def part(attempt: int, call_id: str = "d1", kind: int = PART) -> bytes:
    return durable_reply(SIGNER, call_id, kind, encode(Part(attempt, 1, packed=False, data=b"data")))


async def test_the_parts_of_the_last_attempt_are_read() -> None:
    ((number, _, found),) = await calls(part(2)).parts(RECORD, 0)
    assert (number, found.attempt) == (1, 2)
    assert await calls(part(2)).parts(RECORD._replace(has_parts=False), 0) == []


@pytest.mark.parametrize("frame", [part(1), part(2, "d2"), part(2, kind=VALUE)], ids=["attempt", "call", "kind"])
async def test_what_is_no_part_of_this_attempt_is_refused(frame: bytes) -> None:
    with pytest.raises(FrameRejected):
        await calls(frame).parts(RECORD, 0)


def test_the_result_of_another_call_is_refused() -> None:
    for frame in (durable_reply(SIGNER, "d2", VALUE, b""), SIGNER.seal(encode(Reply("d1", "me", VALUE, b"")))):
        with pytest.raises(FrameRejected, match="the result of another call"):
            calls().open(frame, "d1")


async def test_while_redis_is_away_that_is_said_and_what_to_do() -> None:
    away, answers = calls(is_open=False), list[Answer]()
    with pytest.raises(BrokerUnavailable, match="ask again in a moment"):
        await away.describe("d1")
    with pytest.raises(BrokerUnavailable, match="ask again in a moment"):
        await away.parts(RECORD, 0)
    away.cancel("d1", answers.append)
    away.expire("d1")
    assert [type(answer) for answer in answers] == [BrokerUnavailable]
