"""References to results: futures for threads and for event loops, and arguments of other calls."""

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from qserve.calls.handle import DeploymentHandle, get_handle
from qserve.calls.process_client import set_current_client
from qserve.calls.ref import Ref, get, wait
from qserve.errors import CallCancelled, GetTimeoutError, ValueNotSerializable
from qserve.settings import Settings
from qserve.wire.messages import ERROR, Reply
from tests.support.calling import Caller, Code, calling, deploy, serving
from tests.support.slowness import patience
from tests.support.waiting import until


def done(value: object) -> Ref[Any]:
    ref: Ref[Any] = Ref()
    ref.set_result(value)
    return ref


def failed(error: Exception) -> Ref[Any]:
    ref: Ref[Any] = Ref()
    ref.set_exception(error)
    return ref


class TestAsAFuture:
    def test_it_works_with_the_tools_for_futures(self) -> None:
        refs: list[Ref[int]] = [Ref() for _ in range(3)]
        for number, ref in enumerate(refs):
            threading.Timer(0.01, ref.set_result, [number]).start()

        finished, late = concurrent.futures.wait(refs, timeout=patience(10))

        assert (finished, late) == (set(refs), set())
        assert {ref.result() for ref in concurrent.futures.as_completed(refs, timeout=patience(10))} == {0, 1, 2}

    def test_a_cancelled_one_counts_as_done_to_them_at_once(self) -> None:
        ref: Ref[int] = Ref()
        threading.Timer(0.01, ref.cancel).start()

        finished, _ = concurrent.futures.wait([ref], timeout=patience(10))

        assert finished == {ref}

    def test_callbacks_get_the_ref_once_before_or_after_it_is_done(self) -> None:
        ref: Ref[int] = Ref()
        seen: list[object] = []
        ref.add_done_callback(seen.append)
        ref.set_result(1)
        ref.add_done_callback(seen.append)

        assert seen == [ref, ref]

    def test_a_timeout_leaves_it_as_it_is(self) -> None:
        ref: Ref[int] = Ref()

        for ask in (ref.result, ref.exception):
            with pytest.raises(GetTimeoutError, match=r"did not end within 0\.01 s; it goes on"):
                ask(0.01)

        ref.set_result(1)
        assert ref.result(0) == 1

    def test_the_error_is_given_or_raised_and_is_the_same_each_time(self) -> None:
        error = ValueError("no")
        ref = failed(error)

        assert ref.exception() is error
        for _ in range(2):
            with pytest.raises(ValueError, match="no") as raised:
                ref.result()
            assert raised.value is error

    def test_a_timeout_that_is_the_calls_own_outcome_is_told_as_it_is(self) -> None:
        ref = failed(GetTimeoutError("over its deadline"))

        with pytest.raises(GetTimeoutError, match=r"^over its deadline$"):
            ref.result(patience(5))

    def test_a_cancelled_one_is_told_apart(self) -> None:
        ref: Ref[int] = Ref()

        assert ref.cancel()
        assert (ref.done(), ref.cancelled()) == (True, True)
        for ask in (ref.result, ref.exception):
            with pytest.raises(CallCancelled, match="was cancelled"):
                ask()

    def test_one_that_has_ended_cannot_be_cancelled(self) -> None:
        assert not done(1).cancel()

    def test_it_says_what_it_is(self) -> None:
        assert repr(Ref()) == "<Ref to a call, pending>"
        assert repr(done(1)) == "<Ref to a call, done>"


class TestAwaiting:
    async def test_it_is_awaited_while_it_is_settled_elsewhere(self) -> None:
        ref: Ref[int] = Ref()
        threading.Timer(0.01, ref.set_result, [7]).start()

        assert await ref == 7

    def test_any_loop_may_await_it_and_many_at_once(self) -> None:
        ref: Ref[int] = Ref()
        waiting = threading.Barrier(4)

        async def task() -> int:
            return await ref

        async def main() -> list[int]:
            tasks = [asyncio.create_task(task()) for _ in range(10)]
            await asyncio.sleep(0)
            waiting.wait(patience(10))
            return await asyncio.gather(*tasks)

        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            loops = [threads.submit(asyncio.run, main()) for _ in range(3)]
            waiting.wait(patience(10))
            ref.set_result(1)
            assert [each.result(patience(10)) for each in loops] == [[1] * 10] * 3

    async def test_awaiting_a_cancelled_one_says_so_and_cancels_nothing_else(self) -> None:
        ref: Ref[int] = Ref()
        asyncio.get_running_loop().call_later(0.01, ref.cancel)

        with pytest.raises(CallCancelled):
            await ref

    async def test_giving_up_to_await_it_leaves_the_call_running(self) -> None:
        ref: Ref[int] = Ref()

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(self.awaited(ref), 0.01)

        ref.set_result(1)
        assert await ref == 1

    async def test_giving_up_to_await_it_leaves_nothing_behind(self) -> None:
        ref: Ref[int] = Ref()
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ref, 0.001)

        assert not ref._done_callbacks

    async def awaited(self, ref: Ref[int]) -> int:
        return await ref

    def test_a_loop_that_has_closed_meanwhile_harms_nobody(self) -> None:
        ref: Ref[int] = Ref()

        async def give_up() -> None:
            task = asyncio.create_task(self.awaited(ref))
            await asyncio.sleep(0)
            task.cancel()

        asyncio.run(give_up())
        ref.set_result(1)

        assert asyncio.run(self.awaited(ref)) == 1


class TestGetAndWait:
    def test_get_gives_one_result_or_a_list_in_order(self) -> None:
        assert get(done(1)) == 1
        assert get([done(1), done(2)]) == [1, 2]
        assert get([]) == []

    def test_get_raises_the_first_error_in_the_order_of_the_list(self) -> None:
        with pytest.raises(ValueError, match="first"):
            get([done(1), failed(ValueError("first")), failed(KeyError("second"))])

    def test_the_timeout_of_get_is_for_all_together(self) -> None:
        started = time.monotonic()

        with pytest.raises(GetTimeoutError, match=r"2 of 3 calls did not end within 0\.05 s"):
            get([Ref(), done(1), Ref()], timeout=0.05)

        assert time.monotonic() - started < patience(5)

    def test_wait_gives_as_many_as_asked_for_in_the_order_given(self) -> None:
        refs = [Ref[int](), done(1), done(2)]

        assert wait(refs) == ([refs[1]], [refs[0], refs[2]])
        assert wait(refs, num_returns=2) == ([refs[1], refs[2]], [refs[0]])

    def test_wait_gives_fewer_when_the_time_is_over(self) -> None:
        refs = [Ref[int](), done(1)]

        assert wait(refs, num_returns=2, timeout=0.01) == ([refs[1]], [refs[0]])
        assert wait(refs[:1], timeout=0) == ([], refs[:1])

    def test_wait_counts_failed_and_cancelled_ones_as_ready(self) -> None:
        cancelled: Ref[int] = Ref()
        cancelled.cancel()
        refs = [failed(ValueError()), cancelled]

        assert wait(refs, num_returns=2, timeout=patience(1)) == (refs, [])

    def test_wait_wakes_up_when_enough_have_ended(self) -> None:
        refs: list[Ref[int]] = [Ref() for _ in range(3)]
        threading.Timer(0.01, refs[1].set_result, [1]).start()

        assert wait(refs, timeout=patience(10)) == ([refs[1]], [refs[0], refs[2]])

    def test_a_wait_that_is_over_leaves_nothing_behind_in_the_refs_that_go_on(self) -> None:
        pending: Ref[int] = Ref()

        assert wait([pending, done(1)])[0]
        with pytest.raises(GetTimeoutError):
            get([pending], timeout=0)

        assert pending._done_callbacks == []

    @pytest.mark.parametrize("number", [0, 3])
    def test_wait_refuses_numbers_that_cannot_be(self, number: int) -> None:
        with pytest.raises(ValueError, match="between 1 and 2"):
            wait([done(1), done(2)], num_returns=number)

    def test_wait_refuses_the_same_ref_twice(self) -> None:
        ref = done(1)
        with pytest.raises(ValueError, match="more than once"):
            wait([ref, ref])

    @pytest.mark.parametrize("ask", [get, wait])
    def test_what_is_no_ref_is_refused_with_a_hint(self, ask: Any) -> None:
        with pytest.raises(TypeError, match="expected a ref, got int; a handle made with sync=False"):
            ask([1])


def test_to_wait_for_nothing_ends_at_once_and_what_is_no_ref_is_named() -> None:
    assert wait([]) == ([], [])
    for function in (get, wait):
        wrong: Any = function
        with pytest.raises(TypeError, match="expected a ref or a list of refs, got int"):
            wrong(3)
        with pytest.raises(TypeError, match="expected a ref or a list of refs, got generator"):
            wrong(done(number) for number in range(3))


@pytest.fixture
async def caller(settings: Settings) -> AsyncIterator[Caller]:
    """A client on this loop, which handles use."""
    deploy(settings)
    async with calling(settings) as caller:
        set_current_client(caller.client)
        yield caller
        set_current_client(None)


@pytest.fixture
async def code(caller: Caller) -> AsyncIterator[Code]:
    """The code of a replica."""
    settings = caller.client.settings
    async with serving(settings, deploy(settings)) as (_, code):
        yield code


@pytest.fixture
def handle(code: Code) -> "DeploymentHandle[Any]":
    """A handle of what it serves."""
    return get_handle("Echo")


class TestCalls:
    async def test_blocking_on_the_loop_that_receives_the_result_is_refused(
        self, handle: "DeploymentHandle[Any]"
    ) -> None:
        ref = handle.remote("x")

        for ask in (ref.result, ref.exception, lambda: get([ref]), lambda: wait([ref])):
            with pytest.raises(RuntimeError, match="would block the event loop that receives the result: `await`"):
                ask()

        assert await ref == "x"
        assert ref.result() == "x"

    async def test_other_threads_may_block_on_it(self, handle: "DeploymentHandle[Any]") -> None:
        assert await asyncio.to_thread(lambda: handle.remote("x").result(patience(10))) == "x"

    async def test_a_ref_says_what_it_calls(self, handle: "DeploymentHandle[Any]", code: Code) -> None:
        ref = handle.wait.remote("x")

        assert repr(ref) == "<Ref to Echo.wait, pending>"
        code.gate.set()
        await ref

    async def test_its_deadline_does_not_hold_for_what_a_call_leaves_behind(
        self, handle: "DeploymentHandle[Any]", code: Code
    ) -> None:
        await handle.options(timeout_s=patience(30)).begin.remote()

        assert code.started[0].limit(3600) == 3600

    async def test_cancelling_withdraws_the_call(self, caller: Caller, handle: "DeploymentHandle[Any]") -> None:
        ref = handle.wait.remote("x")

        assert ref.cancel()

        assert caller.client.pending == 0
        with pytest.raises(CallCancelled):
            await ref

    async def test_cancels_and_answers_at_the_same_time_leave_every_ref_settled(
        self, handle: "DeploymentHandle[Any]"
    ) -> None:
        def race() -> int:
            refs = [handle.remote(n) for n in range(2000)]
            cancelled = {n for n in range(0, 2000, 3) if refs[n].cancel()}
            assert not concurrent.futures.wait(refs, patience(30)).not_done
            for n, ref in enumerate(refs):
                assert ref.cancelled() if n in cancelled else ref.result(0) == n
            return len(cancelled)

        assert await asyncio.to_thread(race) > 0


class TestAsArguments:
    async def test_refs_are_resolved_wherever_they_stand(self, handle: "DeploymentHandle[Any]") -> None:
        nested = [handle.remote("a"), {"k": handle.remote("b"), "l": (handle.remote("c"),)}]

        assert await handle.remote(nested) == ["a", {"k": "b", "l": ("c",)}]

    async def test_a_stream_is_no_argument_and_the_error_says_what_to_do(self, handle: "DeploymentHandle[Any]") -> None:
        stream = handle.options(stream=True).parts.remote("x")

        with pytest.raises(ValueNotSerializable, match=r"the stream of Echo\.parts cannot be sent .* iterate it"):
            handle.remote(stream)

        assert [part async for part in stream] == ["x"]

    async def test_the_same_ref_may_stand_in_two_places(self, handle: "DeploymentHandle[Any]") -> None:
        ref = handle.remote("a")

        assert await handle.remote([ref, ref]) == ["a", "a"]

    async def test_the_error_of_an_argument_is_the_calls_error_and_it_does_not_run(
        self, handle: "DeploymentHandle[Any]", code: Code
    ) -> None:
        with pytest.raises(ValueError, match="broken"):
            await handle.remote([handle.fail.remote("broken"), handle.remote("fine")])

        assert [value for value in code.started if isinstance(value, list)] == []

    async def test_a_cancelled_argument_cancels_the_call(self, handle: "DeploymentHandle[Any]") -> None:
        argument = handle.wait.remote("x")
        outer = handle.remote(argument)
        argument.cancel()

        with pytest.raises(CallCancelled):
            await outer

    async def test_an_argument_that_never_comes_blocks_nobody_else(
        self, handle: "DeploymentHandle[Any]", code: Code
    ) -> None:
        stuck = handle.remote([Ref[Any]()])

        assert await handle.remote("next") == "next"
        assert not stuck.done()
        assert stuck.cancel()
        assert code.started == ["next"]

    async def test_a_call_cancelled_while_its_argument_is_awaited_is_not_sent(
        self, handle: "DeploymentHandle[Any]", code: Code
    ) -> None:
        argument: Ref[Any] = Ref()
        outer = handle.remote(argument)
        outer.cancel()

        argument.set_result("late")

        assert await handle.remote("next") == "next"
        assert code.started == ["next"]

    async def test_an_argument_that_arrives_from_another_thread_starts_the_call(
        self, handle: "DeploymentHandle[Any]", code: Code
    ) -> None:
        argument: Ref[Any] = Ref()
        outer = handle.remote(argument)
        threading.Timer(0.01, argument.set_result, ["now"]).start()

        assert await outer == "now"

    async def test_a_result_that_cannot_travel_on_fails_the_call_that_needs_it(
        self, handle: "DeploymentHandle[Any]"
    ) -> None:
        outer = handle.remote(done(threading.Lock()))

        with pytest.raises(TypeError, match="the call to Echo"):
            await outer

    async def test_an_answer_that_cannot_be_read_ends_the_ref(
        self, caller: Caller, handle: "DeploymentHandle[Any]", code: Code
    ) -> None:
        ref = handle.wait.remote("x")
        await until(lambda: code.started)
        (pending,) = caller.client._pending.values()
        caller.client._pending.settle(pending, Reply(pending.id, caller.client.id, ERROR, b"no error"))

        assert await asyncio.to_thread(ref.exception, 5) is not None
