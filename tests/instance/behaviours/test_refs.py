"""Refs: results that may not be there yet, as arguments, and how calls fail."""

import asyncio
import concurrent.futures
import os
import signal
import threading
from typing import Any

import pytest

import qserve
from qserve import serve
from tests.support.gates import Gate, Notes
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, wait_until

pytestmark = pytest.mark.usefixtures("qserve_instance")


class OfTheCaller(Exception):
    """An exception the caller knows, too."""


def deploy_waiter() -> Any:
    """A deployment whose calls end when their gate opens."""

    @serve.deployment
    async def waiter(gate: Gate, value: object = "passed") -> object:
        await gate.passed()
        return value

    waiter.deploy()
    return waiter.get_handle()


def deploy_echo(notes: Notes) -> Any:
    """A deployment that gives back what it gets, and notes that it was called."""

    @serve.deployment
    async def echo(*args: object) -> object:
        notes.add([type(value).__name__ for value in args])
        return args

    echo.deploy()
    return echo.get_handle()


def test_a_ref_as_an_argument_is_resolved_before_the_target_starts(gate: Gate, notes: Notes) -> None:
    waiter, echo = deploy_waiter(), deploy_echo(notes)

    ref = echo.remote(waiter.remote(gate), 2)

    with pytest.raises(qserve.GetTimeoutError):
        ref.result(0.3)
    assert notes.read() == []
    gate.open()
    assert qserve.get(ref, timeout=patience(LIMIT_S)) == ("passed", 2)
    assert notes.read() == ["['str', 'int']"]


def test_refs_inside_lists_and_dicts_are_resolved_too(gate: Gate, notes: Notes) -> None:
    waiter, echo = deploy_waiter(), deploy_echo(notes)
    gate.open()

    ref = echo.remote([waiter.remote(gate, 1), 2], {"key": (waiter.remote(gate, 3),)})

    assert qserve.get(ref, timeout=patience(LIMIT_S)) == ([1, 2], {"key": (3,)})


def test_an_argument_that_is_not_there_yet_does_not_hold_up_later_calls(gate: Gate, notes: Notes) -> None:
    waiter, echo = deploy_waiter(), deploy_echo(notes)

    stuck = echo.remote(waiter.remote(gate))
    later = [echo.remote(number) for number in range(3)]

    assert qserve.get(later, timeout=patience(LIMIT_S)) == [(0,), (1,), (2,)]
    assert not stuck.done()
    gate.open()
    assert qserve.get(stuck, timeout=patience(LIMIT_S)) == ("passed",)


def test_of_two_chains_the_stuck_one_does_not_stop_the_other_inside_a_deployment(gate: Gate, notes: Notes) -> None:
    waiter = deploy_waiter()

    @serve.deployment
    class Combine:
        async def __call__(self, value: object) -> object:
            notes.add(value)
            return value

    @serve.deployment
    class Composed:
        def __init__(self) -> None:
            self.waiter = waiter.options()
            self.combine = Combine.get_handle(sync=False)

        async def __call__(self, gate: Gate | None, value: object) -> object:
            first = self.waiter.remote(gate, value) if gate else value
            return await (await self.combine.remote(first))

    Combine.deploy()
    Composed.deploy()
    handle = Composed.get_handle()

    stuck = handle.remote(gate, "second")

    assert qserve.get(handle.remote(None, "first"), timeout=patience(LIMIT_S)) == "first"
    gate.open()
    assert qserve.get(stuck, timeout=patience(LIMIT_S)) == "second"
    assert notes.read() == ["first", "second"]


def test_the_error_of_an_argument_is_the_error_of_the_call(notes: Notes) -> None:
    echo = deploy_echo(notes)

    @serve.deployment
    def fails() -> None:
        raise ZeroDivisionError("no")

    fails.deploy()

    with pytest.raises(ZeroDivisionError):
        qserve.get(echo.remote(fails.get_handle().remote()), timeout=patience(LIMIT_S))
    assert notes.read() == []


def test_get_takes_a_list_and_a_timeout_after_which_the_call_goes_on(gate: Gate) -> None:
    waiter = deploy_waiter()
    refs = [waiter.remote(gate, number) for number in range(3)]

    with pytest.raises(qserve.GetTimeoutError):
        qserve.get(refs[0], timeout=0.1)
    with pytest.raises(TimeoutError):
        qserve.get(refs, timeout=0.1)

    gate.open()
    assert qserve.get(refs, timeout=patience(LIMIT_S)) == [0, 1, 2]


def test_wait_splits_refs_into_those_that_are_ready_and_the_rest_in_order(gate: Gate, tmp_path: Any) -> None:
    waiter, opened = deploy_waiter(), Gate(tmp_path / "opened")
    opened.open()
    refs = [waiter.remote(gate), waiter.remote(opened), waiter.remote(gate), waiter.remote(opened)]

    ready, rest = qserve.wait(refs, num_returns=2, timeout=patience(LIMIT_S))
    assert (ready, rest) == ([refs[1], refs[3]], [refs[0], refs[2]])

    ready, rest = qserve.wait(refs, num_returns=4, timeout=0.1)
    assert (ready, rest) == ([refs[1], refs[3]], [refs[0], refs[2]])

    gate.open()
    assert qserve.wait(refs, num_returns=4, timeout=patience(LIMIT_S)) == (refs, [])


async def test_wait_takes_the_refs_of_async_handles(gate: Gate) -> None:
    waiter = deploy_waiter()
    handle = serve.get_deployment("waiter").get_handle(sync=False)
    gate.open()

    refs = [await handle.remote(gate), waiter.remote(gate)]

    assert qserve.wait(refs, num_returns=2, timeout=patience(LIMIT_S)) == (refs, [])


def test_an_error_of_user_code_is_a_task_error_and_of_its_own_class_with_the_remote_traceback() -> None:
    @serve.deployment
    class Fails:
        def divide(self) -> float:
            return 1 / 0

        async def runtime(self) -> None:
            raise RuntimeError("from the replica")

        def own(self) -> None:
            raise OfTheCaller("known to both")

    Fails.deploy()
    handle = Fails.get_handle()

    for method, kind in [("divide", ZeroDivisionError), ("runtime", RuntimeError), ("own", OfTheCaller)]:
        with pytest.raises(kind) as caught:
            qserve.get(handle.options(method_name=method).remote(), timeout=patience(LIMIT_S))
        assert isinstance(caught.value, qserve.TaskError)
        assert "Traceback (most recent call last)" in str(caught.value)
        assert f"in {method}" in str(caught.value)


def test_the_ref_of_a_call_whose_replica_was_killed_says_so(notes: Notes, gate: Gate) -> None:
    @serve.deployment
    async def killed() -> None:
        notes.add(os.getpid())
        await gate.passed()

    killed.deploy()
    ref = killed.get_handle().remote()
    [pid] = notes.wait_for(1)

    os.kill(int(pid), signal.SIGKILL)

    with pytest.raises(qserve.ReplicaDied):
        qserve.get(ref, timeout=patience(LIMIT_S))
    assert notes.read() == [pid]  # and it has not been run again


async def test_refs_work_with_the_tools_for_futures(gate: Gate) -> None:
    waiter = deploy_waiter()
    refs = [waiter.remote(gate, number) for number in range(3)]
    called = threading.Event()
    refs[0].add_done_callback(lambda _: called.set())
    gate.open()

    assert await asyncio.gather(*refs) == [0, 1, 2]
    assert {ref.result() for ref in concurrent.futures.as_completed(refs, patience(LIMIT_S))} == {0, 1, 2}
    assert called.wait(patience(LIMIT_S))
    assert refs[0].exception() is None


def test_a_cancelled_call_that_is_still_queued_never_runs(gate: Gate, notes: Notes) -> None:
    @serve.deployment(max_concurrent_queries=1)
    async def one_at_a_time(name: str) -> None:
        notes.add(name)
        await gate.passed()

    one_at_a_time.deploy()
    handle = one_at_a_time.get_handle()
    running = handle.remote("running")
    notes.wait_for(1)
    queued, last = handle.remote("queued"), handle.remote("last")
    wait_until(lambda: serve.status()["one_at_a_time"].queued == 3)

    assert queued.cancel()

    wait_until(lambda: serve.status()["one_at_a_time"].queued == 2)
    gate.open()
    qserve.get([running, last], timeout=patience(LIMIT_S))
    assert notes.read() == ["running", "last"]
    with pytest.raises(qserve.CallCancelled):
        queued.result()
