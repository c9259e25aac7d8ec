"""Handles where user code in a replica may use them: its own threads, its own event loops, refs awaited twice."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from qserve import serve
from qserve.context import current_call
from qserve.errors import ValueNotSerializable
from qserve.testing import TestInstance
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S

pytestmark = pytest.mark.usefixtures("qserve_instance")


class Inner:
    def __call__(self, number: int) -> int:
        return number + 1

    async def gated(self) -> None:
        await asyncio.sleep(3600)


class Outer:
    def threads(self) -> list[int]:
        """From threads of its own."""
        inner: Any = serve.get_deployment("inner").get_handle()
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda number: inner.remote(number).result(30), range(8)))

    def loops(self) -> list[int]:
        """From event loops of its own, one after the other."""

        async def ask(number: int) -> int:
            inner: Any = serve.get_deployment("inner").get_handle(sync=False)
            answer: int = await (await inner.remote(number))
            return answer

        return [asyncio.run(ask(number)) for number in range(3)]

    async def executor(self) -> list[int]:
        """From the default executor of the replica's event loop."""
        inner: Any = serve.get_deployment("inner").get_handle()
        loop = asyncio.get_running_loop()
        asked = (loop.run_in_executor(None, inner.remote(number).result, 30) for number in range(5))
        return list(await asyncio.gather(*asked))

    async def chain(self, last_first: bool) -> list[int]:
        """Refs that are arguments of other calls, and awaited too, in either order."""
        inner: Any = serve.get_deployment("inner").get_handle(sync=False)
        first = await inner.remote(1)
        second = await inner.remote(first)
        third = await inner.remote(second)
        refs = [third, second, first] if last_first else [second, third, first]
        return [await ref for ref in refs]

    async def __call__(self, request: Request) -> list[str | None]:
        """The ids under which this call, and one that it makes, stand in the log."""
        inner: Any = serve.get_deployment("named").get_handle(sync=False)
        streamed: Any = await anext(inner.options(stream=True).remote())
        return [serve.get_replica_context().request_id, await (await inner.remote()), streamed]

    async def nested(self) -> tuple[int, int]:
        """How many calls this one counts as its own after some that it could not send or has withdrawn."""
        call = current_call.get()
        assert call is not None
        inner: Any = serve.get_deployment("inner").get_handle(sync=False)
        for handle in (inner, inner.options(stream=True)):
            with suppress(ValueNotSerializable):
                await handle.remote(threading.Lock())
        waiting = await inner.gated.remote()
        behind = await inner.remote(waiting)
        behind_too = inner.options(stream=True).remote(waiting)
        both = len(call.nested)
        behind.cancel()
        behind_too.close()
        waiting.cancel()
        for _ in range(1000):
            if not call.nested:
                break
            await asyncio.sleep(0.01)
        return both, len(call.nested)


def request_id() -> str | None:
    return serve.get_replica_context().request_id


def test_handles_work_on_threads_and_loops_of_user_code_and_refs_can_be_used_twice() -> None:
    serve.deployment(name="inner", route_prefix=None)(Inner).deploy()
    serve.deployment(name="outer", route_prefix=None)(Outer).deploy()
    outer: Any = serve.get_deployment("outer").get_handle()

    assert outer.threads.remote().result(patience(LIMIT_S)) == list(range(1, 9))
    assert outer.loops.remote().result(patience(LIMIT_S)) == [1, 2, 3]
    assert outer.executor.remote().result(patience(LIMIT_S)) == list(range(1, 6))
    assert outer.chain.remote(True).result(patience(LIMIT_S)) == [4, 3, 2]
    assert outer.chain.remote(False).result(patience(LIMIT_S)) == [3, 4, 2]


def test_a_call_does_not_keep_those_that_it_could_not_send() -> None:
    serve.deployment(name="inner", route_prefix=None)(Inner).deploy()
    serve.deployment(name="outer", route_prefix=None)(Outer).deploy()

    assert serve.get_deployment("outer").get_handle().nested.remote().result(patience(LIMIT_S)) == (3, 0)


def test_calls_of_a_request_have_its_id(qserve_instance: TestInstance) -> None:
    serve.deployment(name="named", route_prefix=None)(request_id).deploy()
    serve.deployment(name="asked", route_prefix="/asked")(Outer).deploy()

    answer = httpx.get(f"{qserve_instance.url}/asked", headers={"X-Request-Id": "mine"}, timeout=patience(LIMIT_S))

    assert answer.json() == ["mine", "mine", "mine"]
    first: Any = serve.get_deployment("named").get_handle()
    ref = first.remote()
    assert ref.result(patience(LIMIT_S)) == ref.request_id
