"""Handles that stream what generators yield."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from starlette.requests import Request

from qserve import serve
from qserve.errors import CallCancelled, GetTimeoutError, QServeError, TaskError
from tests.support.gates import Gate, Notes

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


@pytest.mark.parametrize("kind", ["sync", "async", "waiting"])
def test_leaving_early_closes_the_generator(kind: str, notes: Notes) -> None:
    @serve.deployment(route_prefix=None)
    class Endless:
        def sync(self) -> Iterator[int]:
            try:
                while True:
                    yield 1
            finally:
                notes.add("closed")

        async def asynchronous(self) -> AsyncIterator[int]:
            try:
                while True:
                    yield 1
                    await asyncio.sleep(0)
            finally:
                notes.add("closed")

        async def waiting(self) -> AsyncIterator[int]:
            try:
                yield 1
                await asyncio.sleep(3600)
            finally:
                notes.add("closed")

    Endless.deploy()
    method = {"sync": "sync", "async": "asynchronous", "waiting": "waiting"}[kind]

    for number in Endless.get_handle().options(stream=True, method_name=method).remote():
        assert number == 1
        break
    assert notes.wait_for(1) == ["closed"]


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
