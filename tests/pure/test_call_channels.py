"""Chunks of calls: whose they are, and what becomes of a stream whose other side or server is gone."""

from collections.abc import Callable
from typing import Any

import pytest

from qserve.broker.connection import Answer, Connection
from qserve.broker.keys import Keys
from qserve.broker.link import Link
from qserve.calls import call_channels
from qserve.calls.call_channels import CallChannels
from qserve.calls.pending import PendingCall
from qserve.errors import StreamBroken
from qserve.wire.channel import ABORT, CREDIT, DATA, HELLO, Chunk
from qserve.wire.messages import Signer
from tests.support.open_connection import OpenConnection


class Process:
    """One that has made the call "made", whose replica is R."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[tuple[str, str, int]] = []
        self.on_answer: Callable[[Answer], None] = lambda _answer: None
        monkeypatch.setattr(call_channels, "send_chunk", self._note)

        async def nothing() -> None: ...

        self.link = Link("redis://nowhere", nothing)
        self.link.sender = OpenConnection()
        self.call = PendingCall("made", "Echo", False, b"", None, 10.0, lambda _outcome: None)
        deadlines: Any = self
        pending: Any = {"made": self.call}
        self.channels = CallChannels("me", Keys("test"), Signer((b"key",)), self.link, pending, deadlines)

    def put_off(self, _call: PendingCall, _chunk: Chunk) -> None:
        """No deadline."""

    def _note(self, *arguments: Any) -> None:
        _, _, _, to, call_id, chunk, self.on_answer = arguments
        self.sent.append((to, call_id, chunk.kind))


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    return Process(monkeypatch)


@pytest.mark.parametrize("answer", [ConnectionError("lost"), None])
async def test_a_stream_ends_when_its_replica_is_gone(process: Process, answer: Answer) -> None:
    channel = process.channels.open(process.call)
    process.channels.take("made", Chunk("R", HELLO))
    await channel.send(b"data")
    assert process.sent == [("R", "made", DATA)]
    process.on_answer(1)
    assert not channel.is_broken
    process.on_answer(answer)
    with pytest.raises(StreamBroken, match="its replica is gone: call again for all of it"):
        await channel.receive()


async def test_a_stream_ends_when_redis_cannot_be_reached(process: Process) -> None:
    channel = process.channels.open(process.call)
    process.channels.take("made", Chunk("R", HELLO))
    process.link.sender = Connection()
    await channel.send(b"data")
    with pytest.raises(StreamBroken, match="Redis cannot be reached"):
        await channel.receive()
    assert process.sent == []


def test_who_streams_to_nobody_is_told_so_once(process: Process) -> None:
    for kind in (DATA, ABORT, CREDIT):
        process.channels.take("unknown", Chunk("R", kind))
    assert process.sent == [("R", "unknown", ABORT)]
    process.on_answer(0)  # and it is gone itself
    process.link.sender = Connection()
    process.channels.take("unknown", Chunk("R", DATA))
    assert len(process.sent) == 1


def test_somebody_else_here_may_take_a_chunk(process: Process) -> None:
    process.channels.on_other = lambda call_id, _chunk: call_id == "theirs"
    process.channels.take("theirs", Chunk("R", DATA))
    assert process.sent == []
    process.channels.take("unknown", Chunk("R", DATA))
    assert process.sent == [("R", "unknown", ABORT)]
