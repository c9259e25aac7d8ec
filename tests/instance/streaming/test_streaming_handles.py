"""Handles that stream what generators yield."""

import asyncio
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from types import FrameType

import httpx
import pytest
from starlette.requests import Request

from qserve import serve
from qserve.calls.streams import ResultStream
from qserve.errors import CallCancelled, GetTimeoutError, QServeError, TaskError
from qserve.wire.channel import Channel
from tests.support.gates import Gate, Notes
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, joined, wait_until

pytestmark = pytest.mark.usefixtures("qserve_instance")


@serve.deployment(route_prefix=None, max_concurrent_queries=10)
class Numbers:
    def count(self, n: int) -> Iterator[int]:
        yield from range(n)

    async def acount(self, n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number

    async def returned(self, n: int) -> Iterator[int]:
        return (number for number in range(n))

    def opened(self, n: int, gate: Gate) -> int:
        gate.pass_through()
        return n

    def failed(self) -> int:
        raise ZeroDivisionError("at once")

    def single(self) -> str:
        return "only"

    def fails(self) -> Iterator[int]:
        yield 1
        raise ZeroDivisionError("at last")

    async def blocks(self, n: int, notes: Notes) -> AsyncIterator[bytes]:
        for _ in range(n):
            yield bytes(100_000)
            notes.add("")


@pytest.mark.parametrize("method", ["count", "acount", "returned"])
def test_a_stream_is_iterated_in_order(method: str) -> None:
    Numbers.deploy()
    handle = Numbers.get_handle().options(stream=True, method_name=method)

    assert list(handle.remote(1000)) == list(range(1000))
    assert list(handle.remote(0)) == []


def test_a_stream_of_a_call_with_a_ref_begins_when_its_value_is_there(gate: Gate) -> None:
    Numbers.deploy()
    handle = Numbers.get_handle()
    streams = handle.options(stream=True)

    waiting = handle.opened.remote(3, gate)
    stream = streams.count.remote(waiting)
    gate.open()
    assert list(stream) == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        list(streams.count.remote(handle.failed.remote()))


def test_a_stream_that_is_closed_before_it_began_calls_nobody(gate: Gate) -> None:
    Numbers.deploy()
    handle = Numbers.get_handle()
    stream = handle.options(stream=True).count.remote(handle.opened.remote(3, gate))
    stream.close()
    with pytest.raises(CallCancelled, match="before its arguments were there"):
        list(stream)


async def test_a_stream_is_iterated_asynchronously() -> None:
    await asyncio.to_thread(Numbers.deploy)

    for sync in (True, False):
        stream = Numbers.get_handle(sync=sync).options(stream=True)
        assert [number async for number in stream.acount.remote(100)] == list(range(100))
        assert [number async for number in await stream.count.remote(3)] == [0, 1, 2]


def test_several_streams_at_once() -> None:
    Numbers.deploy()
    handle = Numbers.get_handle().options(stream=True)
    streams = [handle.acount.remote(200) for _ in range(8)]

    assert [list(turn) for turn in zip(*streams, strict=True)] == [[number] * 8 for number in range(200)]


def test_a_result_that_is_no_generator_is_the_only_one() -> None:
    Numbers.deploy()

    assert list(Numbers.get_handle().options(stream=True).single.remote()) == ["only"]


def test_without_stream_a_generator_is_collected() -> None:
    Numbers.deploy()

    collected: object = Numbers.get_handle().count.remote(3).result()
    assert collected == [0, 1, 2]


def test_an_error_comes_after_what_was_yielded_before_it() -> None:
    Numbers.deploy()
    stream = iter(Numbers.get_handle().options(stream=True).fails.remote())

    assert next(stream) == 1
    with pytest.raises(ZeroDivisionError, match="at last") as failed:
        next(stream)
    assert isinstance(failed.value, TaskError)


def _leave(stream: ResultStream[int]) -> None:
    for number in stream:
        assert number == 1
        break


def _drop(stream: ResultStream[int]) -> None:
    assert next(stream) == 1


def _drop_unread(_stream: ResultStream[int]) -> None: ...


def _leave_to_the_collector(stream: ResultStream[int]) -> None:
    cycle: list[object] = [stream]
    cycle.append(cycle)


@pytest.mark.parametrize("leave", [_leave, _drop, _drop_unread, _leave_to_the_collector])
@pytest.mark.parametrize("kind", ["sync", "async", "waiting"])
def test_leaving_early_closes_the_generator(
    kind: str, leave: Callable[[ResultStream[int]], None], notes: Notes
) -> None:
    @serve.deployment(route_prefix=None)
    class Endless:
        def sync(self) -> Iterator[int]:
            notes.add("opened")
            try:
                while True:
                    yield 1
            finally:
                notes.add("closed")

        async def asynchronous(self) -> AsyncIterator[int]:
            notes.add("opened")
            try:
                while True:
                    yield 1
                    await asyncio.sleep(0)
            finally:
                notes.add("closed")

        async def waiting(self) -> AsyncIterator[int]:
            notes.add("opened")
            try:
                yield 1
                await asyncio.sleep(3600)
            finally:
                notes.add("closed")

    Endless.deploy()
    method = {"sync": "sync", "async": "asynchronous", "waiting": "waiting"}[kind]

    stream = Endless.get_handle().options(stream=True, method_name=method).remote()
    notes.wait_for(1)
    leave(stream)
    del stream
    gc.collect()
    assert notes.wait_for(2) == ["opened", "closed"]


def test_a_stream_that_is_dropped_on_the_loop_of_a_replica_closes_the_generator(notes: Notes) -> None:
    @serve.deployment(route_prefix=None)
    class Endless:
        async def __call__(self) -> AsyncIterator[int]:
            try:
                while True:
                    yield 1
                    await asyncio.sleep(0)
            finally:
                notes.add("closed")

    @serve.deployment(route_prefix=None)
    class Reader:
        async def __call__(self) -> int:
            endless = serve.get_deployment("Endless").get_handle(sync=False).options(stream=True)
            first: int = await anext(endless.remote())
            return first

    Endless.deploy()
    Reader.deploy()

    assert Reader.get_handle().remote().result(patience(LIMIT_S)) == 1
    assert notes.wait_for(1) == ["closed"]


async def test_a_part_that_arrives_as_its_reader_gives_up_is_read_next(monkeypatch: pytest.MonkeyPatch) -> None:
    await asyncio.to_thread(Numbers.deploy)
    stream = Numbers.get_handle(sync=False).options(stream=True).count.remote(5)
    arrived, receive = threading.Event(), Channel.receive

    async def telling(channel: Channel) -> bytes | None:
        part = await receive(channel)
        arrived.set()
        return part

    monkeypatch.setattr(Channel, "receive", telling)
    got: list[int] = []
    for _ in range(5):
        arrived.clear()
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)  # it asks for a part
        assert arrived.wait(patience(LIMIT_S))  # and this loop has not heard of it
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        got.append(await anext(stream))

    assert got == [0, 1, 2, 3, 4]
    assert [number async for number in stream] == []


def _is_waiting(frame: FrameType | None) -> bool:
    """Whether a thread waits for the next part of a stream."""
    assert frame is not None
    called = {caller.f_code for caller, _ in traceback.walk_stack(frame)}
    return frame.f_code is threading.Condition.wait.__code__ and ResultStream.__next__.__code__ in called


def test_a_part_that_arrives_after_its_reader_was_interrupted_is_read_next(gate: Gate) -> None:
    @serve.deployment(route_prefix=None)
    class Held:
        async def __call__(self) -> AsyncIterator[int]:
            await gate.passed()
            yield 1
            yield 2

    Held.deploy()
    stream = Held.get_handle().options(stream=True).remote()
    reader = threading.get_ident()

    def interrupt() -> None:
        wait_until(lambda: _is_waiting(sys._current_frames()[reader]))
        signal.pthread_kill(reader, signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    joined(interrupting)
    gate.open()

    assert list(stream) == [1, 2]


def test_a_reader_that_pauses_pauses_the_generator(notes: Notes) -> None:
    Numbers.deploy()
    stream = iter(Numbers.get_handle().options(stream=True).blocks.remote(100, notes))

    assert len(next(stream)) == 100_000
    notes.wait_for(5)
    settled = _settled(notes)
    assert settled < 30  # a window of it, a few MiB at most
    assert sum(1 for _ in stream) == 99


def _settled(notes: Notes) -> int:
    seen = -1
    while (now := len(notes.read())) > seen:
        seen = now
        time.sleep(0.3)
    return seen


def test_a_replica_that_is_killed_breaks_the_stream() -> None:
    @serve.deployment(route_prefix=None)
    class Pids:
        async def __call__(self) -> AsyncIterator[int]:
            while True:
                yield os.getpid()
                await asyncio.sleep(0.01)

    Pids.deploy()
    stream = iter(Pids.get_handle().options(stream=True).remote())
    os.kill(next(stream), signal.SIGKILL)

    with pytest.raises(QServeError):
        for _ in stream:
            pass


def test_the_deadline_holds_until_the_first_part(gate: Gate) -> None:
    @serve.deployment(route_prefix=None, max_concurrent_queries=10)
    class Late:
        async def never(self) -> AsyncIterator[int]:
            await gate.passed()
            yield 1

        async def slow(self) -> AsyncIterator[int]:
            for number in range(4):
                yield number
                await asyncio.sleep(0.3)

    Late.deploy()
    handle = Late.get_handle().options(stream=True, timeout_s=0.8)

    with pytest.raises(GetTimeoutError):
        list(handle.never.remote())
    assert list(handle.slow.remote()) == [0, 1, 2, 3]


def test_a_deployment_passes_on_the_stream_of_another(http: httpx.Client) -> None:
    @serve.deployment
    class Front:
        def __init__(self) -> None:
            self.numbers = Numbers.get_handle(sync=False).options(stream=True)

        async def __call__(self, request: Request) -> AsyncIterator[str]:
            async for number in self.numbers.acount.remote(50):
                yield f"{number} "

    Numbers.deploy()
    Front.deploy()

    assert http.get("/Front").text.split() == [str(number) for number in range(50)]


def test_a_closed_stream_gives_no_more() -> None:
    Numbers.deploy()
    results = Numbers.get_handle().options(stream=True).count.remote(10_000)
    stream = iter(results)
    next(stream)
    results.close()

    with pytest.raises(QServeError):
        for _ in stream:
            pass
