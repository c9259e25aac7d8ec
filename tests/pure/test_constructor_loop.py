"""A `def __init__` runs on a thread, and uses the event loop of its replica as programs for Ray Serve do."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from tests.support.local_code import running


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def on_a_loop(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    return request.param  # type: ignore[no-any-return]


class Background:
    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.same = asyncio.get_event_loop() is self.loop
        self.task = asyncio.create_task(self.background())
        self.both: Any = asyncio.gather(self.background(), self.background())
        self.in_thread = self.loop.run_in_executor(None, threading.get_ident)
        self.called = asyncio.Event()
        self.loop.call_later(0.001, self.called.set)
        self.loop.call_soon(self.unwanted).cancel()
        self.loop.call_later(0, self.unwanted).cancel()
        self.own_loop = asyncio.run(asyncio.sleep(0, "of its own"))
        self.thread = threading.get_ident()
        self.complete = True

    async def background(self) -> tuple[bool, int]:
        return self.complete, threading.get_ident()

    def unwanted(self) -> None:
        self.complete = False

    async def look(self) -> None:
        here = (True, threading.get_ident())
        assert self.same
        assert self.loop is asyncio.get_running_loop()
        assert await self.task == here
        assert await self.both == [here, here]
        await self.called.wait()
        assert await self.in_thread != threading.get_ident()
        assert self.thread != threading.get_ident()
        assert self.own_loop == "of its own"
        assert self.complete


def test_a_constructor_uses_the_event_loop_and_what_it_begins_finds_it_complete(
    on_a_loop: Callable[[Coroutine[Any, Any, None]], None],
) -> None:
    async def construct_and_look() -> None:
        async with running(Background) as replica:
            await replica.call("look")

    on_a_loop(construct_and_look())


def test_nothing_is_left_of_it_when_a_constructor_has_ended(
    on_a_loop: Callable[[Coroutine[Any, Any, None]], None],
) -> None:
    class Fails:
        def __init__(self) -> None:
            asyncio.create_task(self.background())  # noqa: RUF006
            raise ZeroDivisionError("in the constructor")

        async def background(self) -> None: ...

    class Ordinary:
        def find(self) -> None:
            asyncio.get_running_loop()

    async def construct_twice() -> None:
        before = asyncio.get_running_loop, set(vars(asyncio.get_running_loop()))
        with pytest.raises(ZeroDivisionError):
            async with running(Fails):
                pass
        assert (asyncio.get_running_loop, set(vars(asyncio.get_running_loop()))) == before
        async with running(Ordinary) as replica:
            with pytest.raises(RuntimeError, match="no running event loop"):
                await replica.call("find")

    on_a_loop(construct_twice())


async def test_a_constructor_keeps_the_event_loop_that_it_makes() -> None:
    class Own:
        def __init__(self) -> None:
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)

        def use(self) -> str:
            return asyncio.get_event_loop().run_until_complete(asyncio.sleep(0, "used"))

        def close(self) -> None:
            self.loop.close()

    async with running(Own) as replica:
        assert await replica.call("use") == "used"
        await replica.call("close")
