"""`serve.batch` in a replica."""

import httpx
import pytest
from starlette.requests import Request

import qserve
from qserve import serve
from tests.support.gates import Gate, Notes
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, wait_until

pytestmark = pytest.mark.usefixtures("qserve_instance")


def test_calls_of_many_callers_are_batched_over_handles_and_http(http: httpx.Client) -> None:
    @serve.deployment
    class Batched:
        def __init__(self) -> None:
            self.sizes: list[int] = []

        @serve.batch(max_batch_size=5, batch_wait_timeout_s=0.2)
        async def double(self, numbers: list[int]) -> list[int]:
            self.sizes.append(len(numbers))
            return [2 * number for number in numbers]

        async def __call__(self, request: Request | int) -> int:
            number = request if isinstance(request, int) else int(request.query_params["number"])
            return int(await self.double(number))

        def seen(self) -> list[int]:
            return self.sizes

    Batched.deploy()
    handle = Batched.get_handle()

    refs = [handle.remote(number) for number in range(20)]

    assert qserve.get(refs, timeout=patience(LIMIT_S)) == [2 * number for number in range(20)]
    sizes = qserve.get(handle.seen.remote(), timeout=patience(LIMIT_S))
    assert sum(sizes) == 20
    assert len(sizes) < 20
    assert max(sizes) <= 5
    assert http.get("/Batched?number=21").json() == 42


def test_an_exception_fails_all_calls_of_the_batch_with_its_class(gate: Gate, notes: Notes) -> None:
    @serve.deployment
    class Fails:
        @serve.batch(max_batch_size=3, batch_wait_timeout_s=30)
        async def fail(self, numbers: list[int]) -> list[int]:
            raise ZeroDivisionError

        @serve.batch(max_batch_size=2, batch_wait_timeout_s=30)
        async def short(self, numbers: list[int]) -> list[int]:
            return numbers[1:]

        async def __call__(self, number: int) -> int:
            notes.add(number)
            return int(await self.fail(number))

        async def wrong(self, number: int) -> int:
            return int(await self.short(number))

    Fails.deploy()
    handle = Fails.get_handle()

    refs = [handle.remote(number) for number in range(2)]
    wait_until(lambda: len(notes.read()) == 2)
    assert not any(ref.done() for ref in refs)  # the batch waits for its third
    refs.append(handle.remote(2))

    for ref in refs:
        with pytest.raises(ZeroDivisionError):
            ref.result(patience(LIMIT_S))
    for ref in [handle.wrong.remote(number) for number in range(2)]:
        with pytest.raises(qserve.QServeError, match="The input list has length 2 but the returned list has length 1"):
            ref.result(patience(LIMIT_S))
