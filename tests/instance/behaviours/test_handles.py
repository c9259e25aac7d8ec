"""Handles: how Python code calls deployments."""

import asyncio
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.requests import Request

import qserve
from qserve import serve
from qserve.testing import TestInstance
from tests.support.gates import Gate, Notes
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, joined

pytestmark = pytest.mark.usefixtures("qserve_instance")


def deploy_echo() -> serve.Deployment[Any]:
    """A deployment that tells how it was called."""

    @serve.deployment
    class Echo:
        def __call__(self, *args: object, **kwargs: object) -> object:
            return "call", args, kwargs

        async def other(self, *args: object, **kwargs: object) -> object:
            return "other", args, kwargs

    Echo.deploy()
    return Echo


def test_a_sync_handle_gives_a_ref_at_once(gate: Gate) -> None:
    @serve.deployment
    async def wait() -> str:
        await gate.passed()
        return "passed"

    wait.deploy()

    ref = wait.get_handle().remote()

    assert not ref.done()
    gate.open()
    assert qserve.get(ref, timeout=patience(LIMIT_S)) == "passed"


async def test_an_async_handle_gives_a_ref_when_awaited_which_is_awaited_for_the_result() -> None:
    handle = deploy_echo().get_handle(sync=False)

    ref = await handle.remote(1)

    assert isinstance(ref, qserve.Ref)
    assert await ref == ("call", (1,), {})
    assert await (await handle.remote(2)) == ("call", (2,), {})


async def test_the_ref_of_a_sync_handle_can_be_awaited_and_waited_for_in_a_running_loop() -> None:
    handle = deploy_echo().get_handle()

    assert await handle.remote(1) == ("call", (1,), {})
    assert qserve.get(handle.remote(2), timeout=patience(LIMIT_S)) == ("call", (2,), {})


def test_methods_are_called_by_attribute_or_by_option() -> None:
    handle = deploy_echo().get_handle()

    by_attribute = handle.other.remote(1)
    by_option = handle.options(method_name="other").remote(1)

    assert qserve.get([by_attribute, by_option], timeout=patience(LIMIT_S)) == [("other", (1,), {})] * 2


def test_options_chain_and_the_last_one_wins_and_no_other_handle_changes() -> None:
    deployment = deploy_echo()
    handle = deployment.get_handle()

    chained = handle.options(method_name="nothing").options(method_name="other")

    assert qserve.get(chained.remote(), timeout=patience(LIMIT_S))[0] == "other"
    assert qserve.get(chained.options(method_name="__call__").remote(), timeout=patience(LIMIT_S))[0] == "call"
    assert qserve.get(handle.remote(), timeout=patience(LIMIT_S))[0] == "call"
    assert qserve.get(deployment.get_handle().remote(), timeout=patience(LIMIT_S))[0] == "call"


def test_options_of_http_and_a_shard_key_are_accepted() -> None:
    handle = deploy_echo().get_handle()

    with_options = handle.options(http_method="POST", http_headers={"a": "b"}, shard_key="c")

    assert qserve.get(with_options.remote(1), timeout=patience(LIMIT_S)) == ("call", (1,), {})


@pytest.mark.parametrize("sync", [True, False])
async def test_arguments_arrive_as_they_were_given(sync: bool) -> None:
    handle = deploy_echo().get_handle(sync=sync)
    given = handle.remote(1, [2, {"x": None}], b"3", key=(4.5, True))

    ref = given if isinstance(given, qserve.Ref) else await given

    assert await ref == ("call", (1, [2, {"x": None}], b"3"), {"key": (4.5, True)})


def test_an_unknown_method_is_told_by_the_ref_together_with_those_that_exist() -> None:
    @serve.deployment
    class OneMethod:
        def exists(self) -> None: ...

    OneMethod.deploy()

    ref = OneMethod.get_handle().does_not_exist.remote()  # type: ignore[misc]

    with pytest.raises(qserve.QServeError) as caught:
        qserve.get(ref, timeout=patience(LIMIT_S))
    assert "Tried to call a method 'does_not_exist' that does not exist." in str(caught.value)
    assert "Available methods: ['exists']." in str(caught.value)


@pytest.mark.parametrize("sync", [True, False])
def test_the_same_deployment_and_kind_give_the_same_handle(sync: bool) -> None:
    deployment = deploy_echo()

    handles = {id(deployment.get_handle(sync=sync)) for _ in range(100)}
    handles.add(id(serve.get_deployment("Echo").get_handle(sync=sync)))

    assert len(handles) == 1
    assert id(deployment.get_handle(sync=not sync)) not in handles


@pytest.mark.parametrize("sync", [True, False])
def test_a_handle_can_be_pickled_into_another_process(sync: bool) -> None:
    handle = deploy_echo().get_handle(sync=sync)

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(call_pickled, (pickle.dumps(handle), sync)) == ("call", (1,), {})


def call_pickled(data: bytes, sync: bool) -> object:
    """Runs in another process."""
    handle = pickle.loads(data)
    if sync:
        return qserve.get(handle.remote(1), timeout=patience(LIMIT_S))

    async def call() -> object:
        return await (await handle.remote(1))

    return asyncio.run(call())


@pytest.mark.parametrize("sync", [True, False])
def test_a_handle_may_be_an_init_arg_also_inside_a_closure(sync: bool) -> None:
    handle = deploy_echo().get_handle(sync=sync)

    @serve.deployment
    class Caller:
        def __init__(self, direct: Any, closure: Callable[[], Any]) -> None:
            self.handles = [direct, closure()]

        async def __call__(self) -> list[object]:
            found = [handle.remote(1) for handle in self.handles]
            return [await (ref if isinstance(ref, qserve.Ref) else await ref) for ref in found]

    Caller.deploy(handle, lambda: handle)

    assert qserve.get(Caller.get_handle().remote(), timeout=patience(LIMIT_S)) == [("call", (1,), {})] * 2


def test_a_handle_works_in_threads_that_have_no_event_loop() -> None:
    handle = deploy_echo().get_handle()

    def call(number: int) -> object:
        return qserve.get(handle.remote(number), timeout=patience(LIMIT_S))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(call, range(20))) == [("call", (number,), {}) for number in range(20)]


def test_an_async_handle_works_across_event_loops() -> None:
    handle = deploy_echo().get_handle(sync=False)

    async def call(number: int) -> object:
        return await (await handle.remote(number))

    assert [asyncio.run(call(number)) for number in range(10)] == [("call", (number,), {}) for number in range(10)]


@pytest.mark.parametrize("is_async", [True, False])
def test_deployments_call_deployments_with_handles_of_the_constructor_or_of_the_call(is_async: bool) -> None:
    deploy_echo()

    @serve.deployment
    class SyncCaller:
        def __init__(self) -> None:
            self.handle = serve.get_deployment("Echo").get_handle()

        def __call__(self) -> object:
            return self.handle.remote(1).result(patience(30)), serve.get_deployment("Echo").get_handle().remote(
                2
            ).result(patience(30))

    @serve.deployment
    class AsyncCaller:
        async def __init__(self) -> None:  # type: ignore[misc]
            self.handle = serve.get_deployment("Echo").get_handle(sync=False)

        async def __call__(self) -> object:
            handle = serve.get_deployment("Echo").get_handle()
            return await (await self.handle.remote(1)), await handle.remote(2)

    caller: serve.Deployment[Any] = AsyncCaller if is_async else SyncCaller
    caller.deploy()

    answers = qserve.get(caller.get_handle().remote(), timeout=patience(LIMIT_S))

    assert answers == (("call", (1,), {}), ("call", (2,), {}))


@pytest.mark.parametrize("sync", [True, False])
def test_a_request_can_be_passed_on_and_arrives_as_a_request(sync: bool, http: httpx.Client) -> None:
    @serve.deployment
    async def inner(request: Request) -> str:
        body = (await request.body()).decode()
        return f"{type(request).__name__} {request.method} {request.query_params['q']} {body}"

    @serve.deployment
    class Outer:
        def __init__(self) -> None:
            self.handle: Any = inner.get_handle(sync=sync)

        async def __call__(self, request: Request) -> object:
            if sync:
                await request.body()
                return await self.handle.remote(request)
            return await (await self.handle.remote(request))

    inner.deploy()
    Outer.deploy()

    assert http.post("/Outer?q=1", content=b"body").text == "Request POST 1 body"


def test_a_handle_follows_a_redeploy() -> None:
    @serve.deployment(name="versioned", version="1")
    def first() -> str:
        return "1"

    @serve.deployment(name="versioned", version="2")
    def second() -> str:
        return "2"

    first.deploy()
    handle = first.get_handle()
    assert qserve.get(handle.remote(), timeout=patience(LIMIT_S)) == "1"

    second.deploy()

    assert qserve.get(handle.remote(), timeout=patience(LIMIT_S)) == "2"


def test_a_handle_of_something_not_deployed_is_given_and_its_call_is_told() -> None:
    @serve.deployment
    def later() -> str:
        return "here"

    handle = later.get_handle()
    with pytest.raises(qserve.DeploymentNotFound):
        qserve.get(handle.remote(), timeout=patience(LIMIT_S))

    later.deploy()

    assert qserve.get(handle.remote(), timeout=patience(LIMIT_S)) == "here"


def test_calls_wait_for_the_first_replica(gate: Gate, notes: Notes) -> None:
    @serve.deployment
    class SlowToStart:
        def __init__(self) -> None:
            notes.add("starting")
            gate.pass_through()

        def __call__(self) -> str:
            return "here"

    goal = SlowToStart.deploy(_blocking=False)
    notes.wait_for(1)
    ref = SlowToStart.get_handle().remote()
    assert not ref.done()

    gate.open()

    assert qserve.get(ref, timeout=patience(LIMIT_S)) == "here"
    assert goal.wait(patience(LIMIT_S))


def test_a_replica_runs_no_more_than_max_concurrent_queries_and_the_rest_waits_in_order(
    gate: Gate, notes: Notes
) -> None:
    @serve.deployment(max_concurrent_queries=2)
    async def limited(number: int) -> int:
        notes.add(number)
        await gate.passed()
        return number

    limited.deploy()

    refs = [limited.get_handle().remote(number) for number in range(6)]

    notes.wait_for(2)
    with pytest.raises(qserve.GetTimeoutError):
        refs[2].result(0.3)
    assert notes.read() == ["0", "1"]
    gate.open()
    assert qserve.get(refs, timeout=patience(LIMIT_S)) == list(range(6))
    assert sorted(notes.read()) == [str(number) for number in range(6)]


def test_numpy_arrays_are_arguments_and_results() -> None:
    @serve.deployment
    def double(array: "np.ndarray[Any, Any]") -> object:
        return array * 2

    double.deploy()

    result = qserve.get(double.get_handle().remote(np.arange(6).reshape(2, 3)), timeout=patience(LIMIT_S))

    assert isinstance(result, np.ndarray)
    assert result.tolist() == [[0, 2, 4], [6, 8, 10]]


def test_a_callable_without_parameters_refuses_surplus_arguments_of_a_handle() -> None:
    @serve.deployment
    def nothing() -> str:
        return "called"

    nothing.deploy()
    handle = nothing.get_handle()

    assert qserve.get(handle.remote(), timeout=patience(LIMIT_S)) == "called"
    with pytest.raises(TypeError, match="takes 0 positional arguments but 1 was given"):
        qserve.get(handle.remote(1), timeout=patience(LIMIT_S))  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="got an unexpected keyword argument"):
        qserve.get(handle.remote(key=1), timeout=patience(LIMIT_S))  # type: ignore[call-overload]


def test_handles_of_many_threads_share_one_connection_and_get_their_own_answers(qserve_instance: TestInstance) -> None:
    handle = deploy_echo().get_handle()
    wrong: list[object] = []

    def call(thread: int) -> None:
        for number in range(20):
            answer = qserve.get(handle.remote(thread, number), timeout=patience(LIMIT_S))
            if answer != ("call", (thread, number), {}):
                wrong.append(answer)

    threads = [threading.Thread(target=call, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    joined(*threads)

    assert not wrong
