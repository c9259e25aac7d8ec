"""Large values between processes that cannot open each other's memory: many at a time, both ways, and slowly."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from qserve.broker.inboxes import send_control
from qserve.broker.large import transfers
from qserve.broker.large.bulk_connection import BulkConnection
from qserve.broker.large.lending import Lending, Loan, Sent
from qserve.broker.large.transfers import TransferBroken, Transfers
from qserve.calls.client import Client
from qserve.settings import Settings
from qserve.values.borrowing import Borrowing, NotReachable, ValueGone
from qserve.wire.messages import Control, Signer, decode_lent
from qserve.wire.parts import Parts
from tests.support.calling import calling
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, until

if TYPE_CHECKING:
    import redis

_AT_ONCE = 8
"""How many values a process receives at a time."""
_SIZE = 100_000


@pytest.fixture
async def two(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Client, Client]]:
    """Two processes on different hosts, as far as they can tell."""

    def open_nothing(*_args: object, **_options: object) -> None:
        raise NotReachable

    monkeypatch.setattr(Borrowing, "open", open_nothing)
    async with calling(settings) as one, calling(settings) as other:
        yield one.client.of("Echo"), other.client.of("Echo")


def lent(owner: Client, count: int) -> list[Loan]:
    return [owner.lending.lend(os.urandom(_SIZE)) for _ in range(count)]


async def fetched(reader: Client, loans: list[Loan]) -> list[bytes]:
    found = await asyncio.gather(*(reader.lending.borrow(reader.sender, each.frame, returns=False) for each in loans))
    assert all(isinstance(each, Sent) for each in found)
    return [each.head for each in found]


def contents(loans: list[Loan]) -> list[bytes]:
    return [bytes(loan.parts()[0]) for loan in loans]


async def test_two_processes_that_send_to_each_other_do_not_wait_for_each_other(two: tuple[Client, Client]) -> None:
    one, other = two
    of_one, of_other = lent(one, 2 * _AT_ONCE), lent(other, 2 * _AT_ONCE)
    both = asyncio.gather(fetched(one, of_other), fetched(other, of_one))
    by_one, by_other = await asyncio.wait_for(both, patience(LIMIT_S))
    assert (by_one, by_other) == (contents(of_other), contents(of_one))


async def test_a_value_is_asked_for_when_it_can_be_received(
    two: tuple[Client, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, reader = two
    loans = lent(owner, 3 * _AT_ONCE)
    asked: list[tuple[str, str]] = []
    send = owner.lending.send
    monkeypatch.setattr(owner.lending, "send", lambda *wanted: asked.append(wanted))
    after_them = asyncio.Event()
    owner.on_control = lambda *_: after_them.set()
    reading = asyncio.create_task(fetched(reader, loans))
    await until(lambda: len(asked) >= _AT_ONCE)
    send_control(reader.sender, reader.settings.keys.of("Echo"), reader.signer, owner.id, Control("cancel", ""))
    await asyncio.wait_for(after_them.wait(), patience(LIMIT_S))
    assert len(asked) == _AT_ONCE

    monkeypatch.setattr(owner.lending, "send", send)
    for each in asked:
        send(*each)
    assert await asyncio.wait_for(reading, patience(LIMIT_S)) == contents(loans)


async def test_a_sender_that_is_busy_is_waited_for_as_long_as_it_lives(
    two: tuple[Client, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, reader = two
    monkeypatch.setattr(transfers, "_PATIENCE_S", 0.05)
    looks: list[Any] = []
    real = BulkConnection.call

    def call(self: BulkConnection, *command: Any) -> Any:
        looks.extend(command[:1] if command[0] == "EXISTS" else ())
        return real(self, *command)

    monkeypatch.setattr(BulkConnection, "call", call)
    asked: list[tuple[str, str]] = []
    send = owner.lending.send
    monkeypatch.setattr(owner.lending, "send", lambda *wanted: asked.append(wanted))
    loans = lent(owner, 1)
    reading = asyncio.create_task(fetched(reader, loans))
    await until(lambda: asked and len(looks) >= 3)
    monkeypatch.setattr(transfers, "_PATIENCE_S", 10)
    send(*asked[0])
    assert await asyncio.wait_for(reading, patience(LIMIT_S)) == contents(loans)


@pytest.mark.parametrize("end", ["cancelled", "stopped"])
async def test_what_nobody_wants_any_more_is_not_waited_for(
    two: tuple[Client, Client], monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    owner, reader = two
    monkeypatch.setattr(transfers, "_PATIENCE_S", 0.05)
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(owner.lending, "send", lambda *wanted: asked.append(wanted))
    ended = threading.Event()
    real = Transfers.fetch

    def fetch(self: Transfers, *args: Any) -> Any:
        try:
            return real(self, *args)
        finally:
            ended.set()

    monkeypatch.setattr(Transfers, "fetch", fetch)
    reading = asyncio.create_task(fetched(reader, lent(owner, 1)))
    await until(lambda: asked)
    if end == "stopped":
        reader.lending.stop()
    else:
        reading.cancel()
    await until(ended.is_set)
    with pytest.raises((ValueGone, asyncio.CancelledError)):
        await reading


async def test_a_sender_that_is_gone_is_not_waited_for(
    two: tuple[Client, Client], redis_client: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, reader = two
    keys = reader.settings.keys.of("Echo")
    ours = Transfers(keys.address(reader.settings.redis_url), keys, reader.signer)
    found = msgspec.structs.replace(decode_lent(lent(owner, 1)[0].frame), owner="another")
    monkeypatch.setattr(transfers, "_PATIENCE_S", 0.05)
    with pytest.raises(TransferBroken, match="gone, or did not send it in time"):
        await asyncio.to_thread(ours.fetch, found, lambda: True)

    redis_client.set(keys.alive("another"), 1)
    fetching = asyncio.create_task(asyncio.to_thread(ours.fetch, found, lambda: True))
    await until(lambda: redis_client.xlen(keys.inbox("another")) == 1)
    redis_client.delete(keys.alive("another"))
    with pytest.raises(TransferBroken, match="gone, or did not send it in time"):
        await asyncio.wait_for(fetching, patience(LIMIT_S))


async def test_a_result_is_kept_while_it_is_sent_however_long_that_takes(
    settings: Settings, signer: Signer, redis_client: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "CHUNK", 1000)
    keys = settings.keys.of("Echo")
    url = keys.address(settings.redis_url)
    data = os.urandom((transfers.WINDOW + 2) * 1000)
    lending = Lending("sender", url, keys, signer)
    try:
        loan = lending.lend_result(Parts(b"head", data))
        lent = decode_lent(loan.frame)
        lending.send("t", f"{lent.cookie.hex()}:{lent.generation}")
        await until(lambda: redis_client.llen(keys.transfer("t", "ready")) == transfers.WINDOW)
        loan.since -= 3600

        lending.tick()

        found = await asyncio.to_thread(Transfers(url, keys, signer).receive, "t", lent.sizes)
        assert list(map(bytes, found)) == [b"head", data]
        lending.tick()
        await until(lambda: loan.sendings == 0)
        lending.tick()
        assert lending.lend(b"next").segment is loan.segment, "its memory was not given back"
    finally:
        lending.stop()
