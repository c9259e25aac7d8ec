"""What those who wait for durable calls are told: by the record of a call, and when its result cannot be had."""

from typing import Any

import pytest

from qserve.broker.connection import Answer, Connection
from qserve.broker.keys import Keys
from qserve.broker.link import Link
from qserve.broker.records import durable_reply
from qserve.broker.redis_errors import CommandRefused
from qserve.durable.by_id import CallsById
from qserve.durable.watching import CallWatcher, Watchers
from qserve.errors import BrokerUnavailable, CallCancelled, CallNotFound, FrameRejected
from qserve.wire.call_record import ANYONE, NEWS, PROGRESS
from qserve.wire.messages import VALUE, Outcome, Reply, Signer
from tests.support.open_connection import OpenConnection
from tests.support.waiting import until

SIGNER = Signer((b"key",))


class Server:
    """What a server has: the record of a call, and its large result."""

    def __init__(self, answer: Answer = None, *, large: "bytes | Exception | None" = None) -> None:
        self.answer = answer
        self.large = large
        self.asked = 0

    def attach(self, _connection: Connection, _call_id: str, _process: str, on_answer: Any) -> None:
        self.asked += 1
        on_answer(self.answer)

    async def fetch(self, _connection: Connection, _name: str) -> bytes | None:
        if isinstance(self.large, Exception):
            raise self.large
        return self.large


class Waiting:
    """Somebody who waits for the call d1."""

    def __init__(self, server: Server, *, is_open: bool = True) -> None:
        async def nothing() -> None: ...

        link = Link("redis://nowhere", nothing)
        link.sender = OpenConnection() if is_open else Connection()
        self.link = link
        parts: Any = server
        self.watchers = Watchers(parts, parts, CallsById(parts, Keys("test"), SIGNER, link), "me", link)
        self.outcomes, self.progress, self.news = list[Outcome](), list[bytes](), list[bool]()
        self.watcher = CallWatcher(self.outcomes.append, self.progress.append, lambda: self.news.append(True))
        self.watchers.attach("d1", self.watcher)


def record(result: bytes | None, progress: bytes | None = None) -> list[Any]:
    return [b"", b"", b"", result, progress, b""]


async def test_the_record_of_a_call_tells_its_progress_and_its_result() -> None:
    progress = durable_reply(SIGNER, "d1", PROGRESS, b"half")
    waiting = Waiting(Server(record(durable_reply(SIGNER, "d1", VALUE, b"all"), progress)))
    assert waiting.progress == [b"half"]
    (outcome,) = waiting.outcomes
    assert isinstance(outcome, Reply)
    assert outcome.payload == b"all"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (None, CallNotFound),
        (CommandRefused("NOPERM"), BrokerUnavailable),
        (record(durable_reply(SIGNER, "d2", VALUE, b"")), FrameRejected),
        (record(durable_reply(Signer((b"other",)), "d1", VALUE, b"")), FrameRejected),
        (record(SIGNER.seal(b"\xc1")), FrameRejected),
    ],
)
async def test_a_record_that_cannot_be_read_ends_the_waiting(answer: Answer, error: type[Exception]) -> None:
    assert [type(each) for each in Waiting(Server(answer)).outcomes] == [error]


async def test_a_connection_that_is_lost_ends_no_waiting_and_the_next_one_looks_again() -> None:
    server = Server(BrokerUnavailable("lost"))
    waiting = Waiting(server)
    waiting.watchers.look_at_all(but={"d1"})
    assert server.asked == 1
    assert not waiting.outcomes
    server.answer = record(durable_reply(SIGNER, "d1", VALUE, b"all"))
    waiting.watchers.look_at_all(but=())
    assert len(waiting.outcomes) == 1


async def test_of_a_call_that_expires_those_who_wait_are_told_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those who have not submitted it: no replica may look at it until long after."""
    server = Server([b"scheduled", b"", b"", None, None, b"10"])
    waiting = Waiting(server)
    expired: list[str] = []
    monkeypatch.setattr(CallsById, "expire", lambda _self, call_id: expired.append(call_id))
    server.answer = [b"scheduled", b"", b"", None, None, b"-1"]
    await until(lambda: expired == ["d1"])
    assert server.asked == 2
    assert not waiting.outcomes


@pytest.mark.parametrize("how", ["told", "forgotten"])
async def test_nothing_is_kept_until_a_call_would_have_expired_that_is_waited_for_no_more(how: str) -> None:
    waiting = Waiting(Server([b"scheduled", b"", b"", None, None, b"3600000"]))
    (later,) = waiting.watchers._expiring.values()
    waiting.watchers.look_when_expired("d1", 3600)
    waiting.watchers.look_when_expired("d2", 3600)
    assert list(waiting.watchers._expiring.values()) == [later]
    if how == "told":
        waiting.watchers.settle("d1", Reply("d1", ANYONE, VALUE, b"all"))
    else:
        waiting.watchers.forget("d1", waiting.watcher)
    assert later.cancelled()
    assert not waiting.watchers._expiring


async def test_without_a_connection_nothing_is_asked() -> None:
    server = Server()
    waiting = Waiting(server, is_open=False)
    assert server.asked == 0
    assert not waiting.outcomes
    waiting.watchers.stop()
    assert [type(each) for each in waiting.outcomes] == [CallCancelled]


async def test_who_has_been_forgotten_is_told_nothing() -> None:
    waiting = Waiting(Server(record(None)))
    waiting.watchers.take(Reply("d1", ANYONE, NEWS, b""))
    waiting.watchers.forget("d1", waiting.watcher)
    waiting.watchers.forget("d1", waiting.watcher)
    waiting.watchers.take(Reply("d1", ANYONE, NEWS, b""))
    waiting.watchers.take(Reply("d1", ANYONE, VALUE, b"all"))
    assert waiting.news == [True]
    assert not waiting.outcomes


@pytest.mark.parametrize(
    ("large", "says"),
    [
        (None, "it is gone from Redis"),
        (FrameRejected("not signed"), "could not be fetched: not signed"),
        (CommandRefused("NOPERM"), "fetched: NOPERM"),
    ],
)
async def test_a_large_result_that_is_gone_is_named(large: Exception | None, says: str) -> None:
    waiting = Waiting(Server(record(None), large=large))
    waiting.watchers.take(Reply("d1", ANYONE, VALUE, b"", out_of_line=True))
    await until(lambda: waiting.outcomes)
    (outcome,) = waiting.outcomes
    assert isinstance(outcome, BrokerUnavailable)
    assert says in str(outcome)


async def test_a_large_result_is_fetched() -> None:
    waiting = Waiting(Server(record(None), large=b"all of it"))
    waiting.watchers.take(Reply("d1", ANYONE, VALUE, b"", out_of_line=True))
    await until(lambda: waiting.outcomes)
    (outcome,) = waiting.outcomes
    assert isinstance(outcome, Reply)
    assert outcome.payload == b"all of it"


async def test_a_connection_lost_while_a_large_result_is_fetched_ends_no_waiting() -> None:
    server = Server(record(None), large=BrokerUnavailable("lost"))
    waiting = Waiting(server)
    result = Reply("d1", ANYONE, VALUE, b"", out_of_line=True)
    await waiting.watchers._fetch(result)
    waiting.link.sender = Connection()
    await waiting.watchers._fetch(result)
    assert not waiting.outcomes
    server.large = b"all of it"
    waiting.link.sender = OpenConnection()
    await waiting.watchers._fetch(result)
    assert len(waiting.outcomes) == 1
