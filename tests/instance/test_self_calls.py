"""Calls to a deployment from within itself: those that would never start end with an error that says so."""

import time
from typing import Any

import pytest

import qserve
from qserve import serve
from qserve.errors import GetTimeoutError

pytestmark = pytest.mark.usefixtures("qserve_instance")


def test_a_def_method_that_waits_for_its_own_deployment() -> None:
    @serve.deployment
    def countdown(n: int) -> int:
        return 0 if n == 0 else 1 + qserve.get(serve.get_deployment("countdown").get_handle().remote(n - 1))

    countdown.deploy()
    handle: Any = countdown.get_handle()

    begun = time.monotonic()
    with pytest.raises(GetTimeoutError, match="would never start: the only replica has no room"):
        qserve.get(handle.remote(1))
    assert time.monotonic() - begun < 60  # not the deadline of an hour
    assert qserve.get(handle.remote(0)) == 0


def test_a_def_method_beside_async_ones_that_waits_for_its_thread() -> None:
    @serve.deployment
    class Mixed:
        def outer(self) -> object:
            return qserve.get(serve.get_deployment("Mixed").get_handle().inner.remote())

        def inner(self) -> str:
            return "inner"

        async def other(self) -> str:
            return "other"

    Mixed.deploy()
    handle: Any = Mixed.get_handle()

    with pytest.raises(GetTimeoutError, match="would never start"):
        qserve.get(handle.outer.remote())
    assert qserve.get(handle.inner.remote()) == "inner"


@pytest.mark.parametrize("at_once", [1, 2])
def test_async_calls_that_fill_the_replica_and_go_through_another_deployment(at_once: int) -> None:
    @serve.deployment(max_concurrent_queries=at_once)
    async def there(back: bool) -> str:
        if back:
            return "back"
        ref = await serve.get_deployment("between").get_handle(sync=False).remote()
        return str(await ref)

    @serve.deployment
    async def between() -> str:
        ref = await serve.get_deployment("there").get_handle(sync=False).remote(True)
        return str(await ref)

    there.deploy()
    between.deploy()
    handle: Any = there.get_handle()

    refs = [handle.remote(False) for _ in range(at_once)]

    outcomes = [type(ref.exception()).__name__ for ref in refs]
    assert "GetTimeoutError" in "".join(outcomes)
    assert qserve.get(handle.remote(True)) == "back"
