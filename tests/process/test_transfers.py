"""Large values on their way: in order, of this value and no other, and gone when nobody wants them."""

import asyncio
import os

import pytest
import redis

from qserve.broker.keys import Keys
from qserve.broker.large import transfers
from qserve.broker.large.transfers import CHUNK, Transfers
from qserve.errors import FrameRejected
from qserve.settings import Settings
from qserve.this_machine import this_host
from qserve.values import segments
from qserve.values.borrowing import Borrowing
from qserve.wire.messages import Lent, Signer

MIB = 2**20


@pytest.fixture
def ours(settings: Settings, signer: Signer, keys: Keys, redis_client: "redis.Redis") -> Transfers:
    return Transfers(keys.address(settings.redis_url), keys, signer)


async def sent(ours: Transfers, name: str, data: bytes) -> None:
    await asyncio.to_thread(ours.send, name, [memoryview(data)], lambda: True)


async def test_chunks_that_changed_places_are_noticed(ours: Transfers, redis_client: "redis.Redis", keys: Keys) -> None:
    await sent(ours, "t", os.urandom(2 * CHUNK))
    first, second = keys.transfer("t", "0"), keys.transfer("t", "1")
    redis_client.rename(first, "aside")
    redis_client.rename(second, first)
    redis_client.rename("aside", second)
    with pytest.raises(FrameRejected, match="chunk 0"):
        await asyncio.to_thread(ours.receive, "t", [2 * CHUNK])


async def test_a_chunk_of_another_value_is_noticed(ours: Transfers, redis_client: "redis.Redis", keys: Keys) -> None:
    await sent(ours, "theirs", os.urandom(1000))
    await sent(ours, "t", os.urandom(1000))
    redis_client.rename(keys.transfer("theirs", "0"), keys.transfer("t", "0"))
    with pytest.raises(FrameRejected, match="chunk 0"):
        await asyncio.to_thread(ours.receive, "t", [1000])


async def test_what_nobody_receives_goes_by_itself(ours: Transfers, redis_client: "redis.Redis", keys: Keys) -> None:
    await sent(ours, "t", os.urandom(2 * CHUNK))
    left = redis_client.keys(keys.transfer("t", "*"))
    assert len(left) == 3
    assert all(0 < redis_client.pttl(key) <= transfers._TTL_MS for key in left)


async def test_after_a_failure_nothing_of_it_is_left(ours: Transfers, redis_client: "redis.Redis", keys: Keys) -> None:
    await sent(ours, "t", os.urandom(12 * CHUNK))
    redis_client.set(keys.transfer("t", "1"), b"forged")
    with pytest.raises(FrameRejected):
        await asyncio.to_thread(ours.receive, "t", [12 * CHUNK])
    assert not redis_client.exists(keys.transfer("t", "11"))


async def test_memory_that_may_shrink_is_not_mapped() -> None:
    """Whoever has it mapped would die of SIGBUS."""
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    try:
        cookie = b"c" * 16
        os.ftruncate(fd, MIB)
        os.pwrite(fd, segments.HEADER.pack(cookie, 1), 0)
        lent = Lent("me", this_host(), os.getpid(), fd, os.fstat(fd).st_ino, cookie, 1, (1000,))
        with pytest.raises(FrameRejected, match="may shrink"):
            Borrowing().open(lent, returns=False)
    finally:
        os.close(fd)
