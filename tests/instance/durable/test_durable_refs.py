"""Durable calls from Python: submitted here, collected anywhere."""

import asyncio
import gc
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import qserve
from qserve import serve
from qserve.calls.handle import DeploymentHandle
from qserve.calls.process_client import current_client
from qserve.durable.by_id import CallsById
from qserve.testing import TestInstance
from tests.support.chosen_server import client_of
from tests.support.gates import Gate, Notes
from tests.support.shell import elsewhere
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, until, wait_until

pytestmark = pytest.mark.usefixtures("qserve_instance")


def durable(deployment: Any, **terms: Any) -> Any:
    handle: DeploymentHandle[Any] = deployment.get_handle()
    return handle.options(durable=True, **terms)


def test_a_result_can_be_collected_by_another_process_and_more_than_once() -> None:
    @serve.deployment
    def double(number: int) -> int:
        return number * 2

    double.deploy()

    ref = durable(double).remote(21)

    assert isinstance(ref.id, str)
    assert ref.result(patience(LIMIT_S)) == 42
    for _ in range(2):
        assert elsewhere(f"print(serve.get_ref({ref.id!r}).result(20))") == "42"
    assert serve.get_ref(ref.id).result(patience(LIMIT_S)) == 42


def test_a_ref_can_be_pickled_and_means_the_same_call() -> None:
    @serve.deployment
    def double(number: int) -> int:
        return 2 * number

    double.deploy()
    ref = double.get_handle().options(durable=True).remote(21)

    again = pickle.loads(pickle.dumps(ref))

    assert again.id == ref.id
    assert again.result(LIMIT_S) == 42


def test_a_call_outlives_the_process_that_submitted_it(gate: Gate) -> None:
    @serve.deployment
    def patient() -> str:
        gate.pass_through()
        return "at last"

    patient.deploy()

    call_id = elsewhere("print(serve.get_deployment('patient').get_handle().options(durable=True).remote().id)")
    waiting = serve.get_ref(call_id)

    assert not waiting.done()
    gate.open()
    assert waiting.result(patience(LIMIT_S)) == "at last"


def test_an_error_is_the_same_everywhere() -> None:
    @serve.deployment
    def broken() -> None:
        raise ZeroDivisionError("no")

    broken.deploy()

    ref = durable(broken).remote()

    for each in (ref, serve.get_ref(ref.id)):
        with pytest.raises(ZeroDivisionError, match="no"):
            each.result(patience(LIMIT_S))
    assert ref.status().state == "failed"
    assert ref.status().error == "ZeroDivisionError: no"


def test_large_arguments_and_results_travel(qserve_instance: TestInstance) -> None:
    @serve.deployment
    def echo(data: bytes) -> bytes:
        return data

    echo.deploy()
    data = os.urandom(3 * qserve_instance.settings.out_of_line_bytes)

    ref = durable(echo).remote(data)

    assert ref.result(patience(LIMIT_S)) == data
    assert serve.get_ref(ref.id).result(patience(LIMIT_S)) == data


async def test_asynchronous_code_awaits_submission_and_result() -> None:
    @serve.deployment
    async def double(number: int) -> int:
        return number * 2

    await asyncio.to_thread(double.deploy)
    handle = double.get_handle(sync=False).options(durable=True)

    first = await handle.remote(1)
    second = await handle.remote(first)  # a ref stands for its value

    assert await second == 4


def test_the_bound_of_the_queue_holds_for_durable_calls_too(gate: Gate, notes: Notes) -> None:
    @serve.deployment(max_queued_requests=2)
    def held() -> None:
        notes.add("started")
        gate.pass_through()

    held.deploy()
    refs = [durable(held).remote(), durable(held, delay=1000).remote()]

    with pytest.raises(qserve.BackPressureError):
        durable(held).remote()
    refs[1].cancel()
    refs.append(durable(held).remote())
    gate.open()
    refs[2].result(patience(LIMIT_S))


def test_a_call_to_nobody_is_refused_at_once() -> None:
    with pytest.raises(qserve.DeploymentNotFound):
        DeploymentHandle[Any]("Nobody").options(durable=True).remote()


def test_an_unknown_id_is_told_by_the_ref() -> None:
    with pytest.raises(qserve.CallNotFound):
        serve.get_ref("d" + "0" * 32).result(patience(LIMIT_S))
    with pytest.raises(ValueError, match="not the id of a durable call"):
        serve.get_ref("nonsense")


def test_a_call_whose_replica_dies_runs_again(gate: Gate, notes: Notes) -> None:
    @serve.deployment
    def fragile() -> int:
        notes.add(os.getpid())
        gate.pass_through()
        return serve.get_replica_context().attempt

    fragile.deploy()
    ref = durable(fragile).remote()
    [pid] = notes.wait_for(1)

    os.kill(int(pid), signal.SIGKILL)
    notes.wait_for(2)
    gate.open()

    assert ref.result(patience(LIMIT_S)) == 2
    assert ref.status().attempts == 2


def test_a_call_that_kills_its_replicas_is_given_up_after_three() -> None:
    @serve.deployment
    def poison() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    poison.deploy()

    ref = durable(poison).remote()

    with pytest.raises(qserve.PoisonCall):
        ref.result(patience(LIMIT_S))
    assert ref.status().state == "dead"
    assert ref.status().attempts == 3


def test_a_queued_call_that_is_cancelled_never_runs(gate: Gate, notes: Notes) -> None:
    @serve.deployment
    def held(number: int) -> None:
        notes.add(number)
        gate.pass_through()

    held.deploy()
    first, second = durable(held).remote(1), durable(held).remote(2)
    notes.wait_for(1)
    watching = serve.get_ref(second.id)
    assert second.status().state == "queued"
    assert second.status().position == 0

    assert second.cancel()

    with pytest.raises(qserve.CallCancelled):
        watching.result(patience(LIMIT_S))
    gate.open()
    first.result(patience(LIMIT_S))
    durable(held).remote(3).result(patience(LIMIT_S))
    assert notes.read() == ["1", "3"]
    assert watching.status().state == "cancelled"


def test_a_running_asynchronous_call_is_stopped(notes: Notes) -> None:
    @serve.deployment
    async def endless() -> None:
        notes.add("started")
        try:
            await asyncio.sleep(1000)
        finally:
            notes.add("stopped")

    endless.deploy()
    ref = durable(endless).remote()
    notes.wait_for(1)
    watching = serve.get_ref(ref.id)

    ref.cancel()

    with pytest.raises(qserve.CallCancelled):
        watching.result(patience(LIMIT_S))
    assert notes.wait_for(2) == ["started", "stopped"]


def test_progress_reaches_every_ref(gate: Gate) -> None:
    @serve.deployment
    def slow() -> str:
        serve.get_replica_context().report_progress({"done": 1, "of": 2})
        gate.pass_through()
        return "done"

    slow.deploy()
    ref = durable(slow).remote()

    assert wait_until(ref.progress) == {"done": 1, "of": 2}
    late = serve.get_ref(ref.id)
    assert wait_until(late.progress) == {"done": 1, "of": 2}
    gate.open()
    assert late.result(patience(LIMIT_S)) == "done"


def test_calls_that_are_not_durable_report_to_nobody() -> None:
    @serve.deployment
    def ordinary() -> str:
        serve.get_replica_context().report_progress(1)
        return "fine"

    ordinary.deploy()

    assert ordinary.get_handle().remote().result(patience(LIMIT_S)) == "fine"


def test_a_delayed_call_waits_for_its_time() -> None:
    @serve.deployment
    def clock() -> float:
        return time.time()

    clock.deploy()
    delay_s = patience(0.7)
    started = time.time()

    ref = durable(clock, delay=delay_s).remote()

    assert ref.status().state == "scheduled"
    assert ref.result(patience(LIMIT_S)) - started >= delay_s - 0.01


def test_a_delayed_call_can_be_cancelled(notes: Notes) -> None:
    @serve.deployment
    def noted() -> None:
        notes.add("ran")

    noted.deploy()
    delay_s = patience(0.3)
    ref = durable(noted, delay=delay_s).remote()

    ref.cancel()

    assert wait_until(lambda: ref.status().state == "cancelled")
    durable(noted, delay=delay_s).remote().result(patience(LIMIT_S))  # which is due after it would have been
    assert notes.read() == ["ran"]


def test_a_call_is_tried_again_after_the_errors_it_names(notes: Notes) -> None:
    @serve.deployment
    def flaky(error: str) -> int:
        notes.add(error)
        attempt = serve.get_replica_context().attempt
        if attempt < 3:
            raise {"os": ConnectionResetError, "value": ValueError}[error]("not yet")
        return attempt

    flaky.deploy()

    assert durable(flaky, retries=3, backoff=0.05, retry_on=OSError).remote("os").result(patience(LIMIT_S)) == 3
    assert durable(flaky, retries=3, backoff=0.05).remote("value").result(patience(LIMIT_S)) == 3
    with pytest.raises(ValueError, match="not yet"):
        durable(flaky, retries=3, backoff=0.05, retry_on="OSError").remote("value").result(patience(LIMIT_S))
    assert notes.read() == ["os"] * 3 + ["value"] * 4


def test_an_error_whose_text_redis_does_not_take_arrives_and_harms_no_other_call(qserve_instance: TestInstance) -> None:
    """The names of some files have half a surrogate pair in them, and stand in the texts of errors."""

    @serve.deployment
    def picky(name: str) -> str:
        if name.isascii():
            return name
        raise ValueError(f"cannot read {name}")

    picky.deploy()
    names = ["caf\udce9", "plain"] * 10
    refs = [handle.remote(name) for handle in (picky.get_handle(), durable(picky)) for name in names]

    for name, ref in zip(names * 2, refs, strict=True):
        if name == "plain":
            assert ref.result(patience(LIMIT_S)) == "plain"
            continue
        with pytest.raises(ValueError, match=r"cannot read caf\\udce9"):
            ref.result(patience(LIMIT_S))
    settings = qserve_instance.settings
    with client_of(settings.redis_url) as redis:
        wait_until(lambda: redis.xlen(settings.keys.of("picky").troubles("picky")))


def test_retries_come_to_an_end_in_the_dead_letters() -> None:
    @serve.deployment
    def broken() -> None:
        raise ValueError("for ever")

    broken.deploy()

    ref = durable(broken, retries=2, backoff=0.05).remote()

    with pytest.raises(ValueError, match="for ever"):
        ref.result(patience(LIMIT_S))
    assert ref.status().state == "dead"
    assert ref.status().attempts == 3


def test_a_call_that_expired_does_not_run(gate: Gate, notes: Notes) -> None:
    @serve.deployment
    def held(number: int) -> None:
        notes.add(number)
        gate.pass_through()

    held.deploy()
    first = durable(held).remote(1)
    notes.wait_for(1)

    late = durable(held, expires=0.2).remote(2)

    with pytest.raises(qserve.GetTimeoutError):
        late.result(patience(LIMIT_S))
    assert late.status().state == "expired"
    gate.open()
    first.result(patience(LIMIT_S))
    durable(held).remote(3).result(patience(LIMIT_S))
    assert notes.read() == ["1", "3"]


def test_a_call_that_expires_between_two_attempts_does_not_say_that_it_never_ran(notes: Notes) -> None:
    @serve.deployment
    def broken() -> None:
        notes.add("tried")
        raise ValueError("the disk is full")

    broken.deploy()

    ref = durable(broken, retries=5, backoff=30, expires=1).remote()

    notes.wait_for(1)
    with pytest.raises(qserve.GetTimeoutError, match="or before it was tried again"):
        ref.result(patience(LIMIT_S))
    status = ref.status()
    assert (status.state, status.attempts, status.error) == ("expired", 1, "ValueError: the disk is full")


def test_calls_of_low_priority_let_others_go_first(gate: Gate, notes: Notes) -> None:
    @serve.deployment
    def held(name: str) -> None:
        notes.add(name)
        gate.pass_through()

    held.deploy()
    refs = [durable(held).remote("first")]
    notes.wait_for(1)

    refs.append(durable(held).remote("interactive 0"))  # waits, so that no other is to come before it
    refs += [durable(held, priority="batch").remote(f"batch {number}") for number in range(8)]
    refs.append(durable(held).remote("interactive 1"))
    refs.append(durable(held, delay=0.01).remote("delayed"))
    wait_until(lambda: refs[-1].status().state == "queued")  # the mover has had its chance to be wrong
    gate.open()
    qserve.get(refs, timeout=patience(LIMIT_S))

    batch = [f"batch {number}" for number in range(8)]
    assert notes.read() == ["first", "interactive 0", "interactive 1", "delayed", *batch]


def test_a_result_is_kept_for_as_long_as_was_asked_for() -> None:
    @serve.deployment
    def quick() -> str:
        return "here"

    quick.deploy()
    ref = durable(quick, result_ttl=1).remote()
    assert ref.result(patience(LIMIT_S)) == "here"

    def is_gone() -> bool:
        with pytest.raises(qserve.CallNotFound):
            ref.status()
        return True

    wait_until(lambda: not _knows(ref.id))
    assert is_gone()


def _knows(call_id: str) -> bool:
    try:
        serve.get_ref(call_id).result(patience(LIMIT_S))
    except qserve.CallNotFound:
        return False
    return True


def test_deleting_a_deployment_ends_what_waits_for_it(gate: Gate) -> None:
    @serve.deployment
    def gone() -> None: ...

    gone.deploy()
    ref = durable(gone, delay=1000).remote()

    gone.delete()

    with pytest.raises(qserve.DeploymentNotFound):
        ref.result(patience(LIMIT_S))


@pytest.mark.parametrize(
    "terms",
    [{"delay": -1}, {"retries": -1}, {"priority": "high"}, {"expires": 0}, {"result_ttl": 0}, {"backoff": -1}],
    ids=str,
)
def test_impossible_terms_are_refused(terms: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(terms))):
        DeploymentHandle[Any]("Any").options(durable=True, **terms)


def test_terms_without_durable_are_refused() -> None:
    with pytest.raises(ValueError, match="durable=True"):
        DeploymentHandle[Any]("Any").options(delay=3)  # type: ignore[call-overload]


async def test_asynchronous_code_asks_for_status_and_progress(gate: Gate) -> None:
    @serve.deployment
    async def told() -> str:
        serve.get_replica_context().report_progress(7)
        await gate.passed()
        return "done"

    await asyncio.to_thread(told.deploy)
    ref = await told.get_handle(sync=False).options(durable=True).remote()

    async def has_progress() -> bool:
        return bool(await serve.get_ref(ref.id).aprogress() == 7)  # each time another ref

    await until(has_progress)
    assert (await ref.astatus()).state == "running"
    gate.open()
    assert await ref == "done"


def test_a_call_whose_time_is_over_is_expired_for_whoever_looks(gate: Gate, notes: Notes) -> None:
    @serve.deployment
    def held() -> None:
        notes.add("held")
        gate.pass_through()

    held.deploy()
    first = durable(held).remote()
    notes.wait_for(1)
    ref = durable(held, expires=0.2).remote()

    wait_until(lambda: ref.status().state != "queued")
    status = ref.status()
    gate.open()

    assert status.state == "expired"
    assert status.ended is not None
    first.result(patience(LIMIT_S))
    assert notes.read() == ["held"]


def test_what_is_cancelled_is_kept_as_long_as_its_result_would_be(qserve_instance: TestInstance) -> None:
    @serve.deployment
    def later() -> None:
        pass

    later.deploy()
    ref = durable(later, delay=1000, result_ttl=50).remote()
    ref.cancel()
    wait_until(lambda: ref.status().state == "cancelled")

    with client_of(qserve_instance.settings.redis_url) as redis:
        assert 0 < redis.ttl(qserve_instance.settings.keys.call(ref.id)) <= 50


def watched(call_id: str) -> bool:
    return call_id in current_client().of_call(call_id).durable.watchers._watchers


def test_a_ref_that_was_dropped_is_waited_for_no_more(gate: Gate) -> None:
    @serve.deployment(route_prefix=None)
    def held() -> str:
        gate.pass_through()
        return "done"

    held.deploy()
    submitted = durable(held).remote()
    call_id, told = submitted.id, list[Any]()
    wait_until(lambda: watched(call_id))
    again = serve.get_ref(call_id)
    assert again.status().state in ("queued", "running")
    del submitted
    gc.collect()
    assert watched(call_id)  # for the other one
    del again
    gc.collect()
    wait_until(lambda: not watched(call_id))

    serve.get_ref(call_id).add_done_callback(lambda ref: told.append(ref.result(0)))
    gc.collect()
    gate.open()
    wait_until(lambda: told == ["done"])
    wait_until(lambda: not watched(call_id))


async def test_a_ref_that_nobody_awaits_any_more_may_be_dropped(gate: Gate) -> None:
    @serve.deployment(route_prefix=None)
    def held() -> None:
        gate.pass_through()

    await asyncio.to_thread(held.deploy)
    handle = held.get_handle(sync=False).options(durable=True)
    ref: Any = await handle.remote()
    call_id = ref.id
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ref, 0.05)
    del ref
    gc.collect()
    await until(lambda: not watched(call_id))
    gate.open()


async def test_who_leaves_while_parts_or_a_status_are_read_leaves_nothing_behind(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @serve.deployment(route_prefix=None)
    def parts() -> Iterator[int]:
        yield 1
        gate.pass_through()
        yield 2

    await asyncio.to_thread(parts.deploy)
    ref: Any = await parts.get_handle(sync=False).options(durable=True).remote()
    first = asyncio.Event()

    async def read() -> None:
        async for _ in ref:
            first.set()

    reading = asyncio.create_task(read())
    await asyncio.wait_for(first.wait(), patience(LIMIT_S))
    await until(lambda: ref._asking.news)  # it waits for the second part
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await until(lambda: not ref._asking.news)

    asked, released, ended = threading.Event(), threading.Event(), threading.Event()
    describe = CallsById.describe

    async def held(by_id: CallsById, call_id: str, after_event: int = 0) -> Any:
        asked.set()
        try:
            await until(released.is_set)
            return await describe(by_id, call_id, after_event)
        finally:
            ended.set()

    monkeypatch.setattr(CallsById, "describe", held)
    asking = asyncio.create_task(ref.astatus())
    await until(asked.is_set)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    released.set()
    await until(ended.is_set)
    assert (await ref.astatus()).state == "running"
    assert "a background task failed" not in caplog.text
    gate.open()


def test_a_replica_reads_the_parts_of_a_durable_call_on_its_own_loop() -> None:
    @serve.deployment(route_prefix=None)
    def parts() -> Iterator[int]:
        yield from (1, 2)

    @serve.deployment(route_prefix=None)
    async def reader() -> list[int]:
        ref: Any = await serve.get_deployment("parts").get_handle(sync=False).options(durable=True).remote()
        return [part async for part in ref]

    parts.deploy()
    reader.deploy()
    assert reader.get_handle().remote().result(patience(LIMIT_S)) == [1, 2]
