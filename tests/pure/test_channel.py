"""A channel delivers a stream whole and in order, or breaks where both sides see it."""

import asyncio
from collections.abc import Callable

import pytest

from qserve.errors import Indeterminate, StreamBroken
from qserve.wire.channel import ABORT, CREDIT, DATA, HELLO, LARGEST_PART, WINDOW, Channel, Chunk
from tests.support.slowness import patience


class Wire:
    """Two channels, and what travels between them."""

    def __init__(self) -> None:
        self.sent: list[Chunk] = []
        self.drop: Callable[[Chunk], bool] = lambda _: False
        self.server = Channel("replica", lambda _, chunk: self._carry(chunk, self.client), peer="caller")
        self.client = Channel("caller", lambda _, chunk: self._carry(chunk, self.server))

    def _carry(self, chunk: Chunk, to: Channel) -> None:
        self.sent.append(chunk)
        if not self.drop(chunk):
            to.feed(chunk)


async def test_messages_arrive_in_order_and_as_they_were_sent() -> None:
    wire = Wire()
    large = bytes(range(256)) * 2048
    assert len(large) > LARGEST_PART

    async def send() -> None:
        for message in (b"one", b"", large, b"last"):
            await wire.server.send(message)
        await wire.server.end()

    sending = asyncio.create_task(send())
    received = []
    while (message := await wire.client.receive()) is not None:
        received.append(message)
    await sending
    assert received == [b"one", b"", large, b"last"]
    assert await wire.client.receive() is None


async def test_a_slow_reader_stops_the_writer_at_the_window() -> None:
    wire = Wire()
    part = b"x" * LARGEST_PART
    sent = 0

    async def send() -> None:
        nonlocal sent
        for _ in range(100):
            await wire.server.send(part)
            sent += 1

    sending = asyncio.create_task(send())
    for _ in range(200):
        await asyncio.sleep(0)
    assert sent == WINDOW // LARGEST_PART
    for _ in range(100):
        assert await wire.client.receive() == part
    await sending


async def test_small_messages_are_bounded_too() -> None:
    wire = Wire()
    sending = asyncio.create_task(_send_many(wire.server, 5000))
    for _ in range(6000):
        await asyncio.sleep(0)
    assert len(wire.sent) == WINDOW // 1024
    for _ in range(5000):
        await wire.client.receive()
    await sending


async def _send_many(channel: Channel, count: int) -> None:
    for _ in range(count):
        await channel.send(b"x")


async def test_the_caller_sends_only_once_it_knows_the_replica() -> None:
    wire = Wire()
    sending = asyncio.create_task(wire.client.send(b"body"))
    await asyncio.sleep(0)
    assert not sending.done()
    wire.server.greet()
    await sending
    assert await wire.server.receive() == b"body"


async def test_a_missing_part_breaks_both_sides() -> None:
    wire = Wire()
    wire.drop = lambda chunk: chunk.number == 1
    for _ in range(3):
        await wire.server.send(b"part")
    assert await wire.client.receive() == b"part"
    with pytest.raises(StreamBroken, match="part 1 of the stream was lost"):
        await wire.client.receive()
    with pytest.raises(StreamBroken, match="part 1"):
        await wire.server.send(b"more")


async def test_to_its_reader_a_stream_is_broken_by_whatever_ended_its_call() -> None:
    wire = Wire()
    wire.client.close(Indeterminate("Redis lost the call"))

    with pytest.raises(StreamBroken, match="Redis lost the call"):
        await wire.client.receive_part()


async def test_a_second_replica_cannot_continue_a_stream() -> None:
    wire = Wire()
    await wire.server.send(b"first")
    other = Channel("another replica", lambda _, chunk: wire.client.feed(chunk), peer="caller")
    await other.send(b"first")
    assert await wire.client.receive() == b"first"
    with pytest.raises(StreamBroken, match="has died"):
        await wire.client.receive()


@pytest.mark.parametrize("is_broken", [False, True])
async def test_a_second_replica_is_told_that_the_beginning_is_gone(is_broken: bool) -> None:
    told: list[tuple[str, int]] = []
    channel = Channel("caller", lambda to, chunk: told.append((to, chunk.kind)))
    seen: list[str] = []
    channel.on_second_peer = lambda: seen.append("second")
    channel.feed(Chunk("first", HELLO))
    if is_broken:
        channel.close(StreamBroken("the first is gone"))

    channel.feed(Chunk("second", HELLO))

    assert (told, seen) == ([("second", ABORT)], ["second"])
    assert channel.is_broken


async def test_a_channel_that_is_over_does_not_keep_itself() -> None:
    wire = Wire()
    wire.client.on_data = wire.client.greet
    wire.client.finish(0)
    assert wire.client.on_data is None


async def test_a_reader_that_leaves_wakes_a_waiting_writer() -> None:
    wire = Wire()
    wire.server.greet()
    sending = asyncio.create_task(_send_many(wire.server, 5000))
    await asyncio.sleep(0)
    wire.client.abort("the client left")
    with pytest.raises(StreamBroken, match="the client left"):
        await sending


async def test_the_final_reply_ends_a_stream_that_had_no_end() -> None:
    wire = Wire()
    await wire.server.send(b"all")
    wire.client.finish(1)
    assert [await wire.client.receive(), await wire.client.receive()] == [b"all", None]


async def test_a_final_reply_that_overtook_lost_parts_breaks_the_stream() -> None:
    wire = Wire()
    await wire.server.send(b"all")
    wire.client.finish(2)
    assert await wire.client.receive() == b"all"
    with pytest.raises(StreamBroken, match="the end of the stream was lost"):
        await wire.client.receive()


async def test_whoever_gives_up_waiting_for_a_message_misses_nothing() -> None:
    wire = Wire()
    large = b"x" * (WINDOW + LARGEST_PART)
    receiving = asyncio.create_task(wire.client.receive())
    sending = asyncio.create_task(wire.server.send(large))
    wire.drop = lambda chunk: chunk.kind == CREDIT  # so that it waits in the middle of the message
    await asyncio.sleep(0.01)
    receiving.cancel()
    await asyncio.wait([receiving])
    wire.drop = lambda _: False
    wire.server.feed(Chunk("caller", CREDIT, 10 * WINDOW))
    assert await wire.client.receive() == large
    await sending


async def test_messages_of_several_senders_stay_whole() -> None:
    wire = Wire()
    messages = [bytes([number]) * (LARGEST_PART * 3 + number) for number in range(8)]
    sending = asyncio.gather(*(wire.server.send(message) for message in messages))
    assert [await wire.client.receive() for _ in messages] == messages
    await sending


async def test_a_message_cut_short_breaks_the_stream() -> None:
    wire = Wire()
    sending = asyncio.create_task(wire.server.send(b"x" * 2 * WINDOW))
    await asyncio.sleep(0.01)
    sending.cancel()
    await asyncio.wait([sending])
    with pytest.raises(StreamBroken, match="a message was cut short"):
        await wire.client.receive()


async def test_several_readers_may_wait_for_the_end() -> None:
    wire = Wire()
    wire.server.greet()
    waiting = [asyncio.create_task(wire.client.wait_broken()) for _ in range(2)]
    await asyncio.sleep(0)
    wire.server.abort("it is over")
    await asyncio.wait_for(asyncio.gather(*waiting), patience(1))


async def test_a_part_that_comes_twice_breaks_the_stream_instead_of_doubling_it() -> None:
    channel = Channel("me", lambda _to, _chunk: None, peer="you")
    for number in (0, 1, 1):
        channel.feed(Chunk("you", DATA, number, b"x"))
    assert [await channel.receive(), await channel.receive()] == [b"x", b"x"]
    with pytest.raises(StreamBroken):
        await channel.receive()
