"""Durable calls, tasks and schedules in `qserve.testing.local`: what a unit test of an application sees of them."""

import asyncio
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from qserve import serve
from qserve.calls.planned_call import plan_call
from qserve.deployments.binding import Application
from qserve.durable.schedules import Declared
from qserve.errors import (
    BackPressureError,
    CallCancelled,
    CallNotFound,
    DeploymentNotFound,
    GetTimeoutError,
    ValueNotSerializable,
)
from qserve.tasks import TaskProcessorConfig, instantiate_adapter_from_config, task_consumer, task_handler
from qserve.testing import LocalServing, local

LIMIT_S = 5


class Broken(Exception):
    pass


@serve.deployment(max_queued_requests=3)
class Jobs:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, name: str) -> str:
        self.seen.append(name)
        serve.get_replica_context().report_progress({"name": name})
        return f"done {name}"

    def fails(self, times: int) -> int:
        self.seen.append("fails")
        if len(self.seen) <= times:
            raise Broken(f"failure {len(self.seen)}")
        return serve.get_replica_context().attempt

    def yields(self) -> Iterator[int]:
        yield from (1, 2, 3)

    def look(self) -> list[Any]:
        return self.seen

    async def waits(self) -> None:
        await asyncio.sleep(60)


@pytest.fixture
def served() -> Iterator[LocalServing]:
    with local(Jobs) as served:
        yield served


def durable(served: LocalServing, **terms: Any) -> Any:
    assert served.handle is not None
    return served.handle.options(durable=True, **terms)


def test_a_durable_call_can_be_asked_for_by_its_id(served: LocalServing) -> None:
    ref = durable(served).remote("a")

    assert serve.get_ref(ref.id).result(LIMIT_S) == ref.result(LIMIT_S) == "done a"
    status = ref.status()
    assert (status.state, status.attempts, status.deployment) == ("done", 1, "Jobs")
    assert serve.get_ref(ref.id).result(LIMIT_S) == "done a"
    assert ref.progress() == {"name": "a"}


def test_a_call_that_nobody_made_is_not_found(served: LocalServing) -> None:
    with pytest.raises(CallNotFound):
        serve.get_ref("d" + "0" * 32).result(LIMIT_S)


def test_a_call_runs_again_at_once_as_often_as_it_may(served: LocalServing) -> None:
    assert durable(served, retries=2, backoff=500).fails.remote(2).result(LIMIT_S) == 3


def test_a_call_whose_retries_have_failed_is_a_dead_letter(served: LocalServing) -> None:
    ref = durable(served, retries=1).fails.remote(9)

    with pytest.raises(Broken, match="failure 2"):
        ref.result(LIMIT_S)
    [letter] = [call for call in served.durable_calls() if call.state == "dead"]
    assert (letter.id, letter.attempts, letter.error) == (ref.id, 2, "Broken: failure 2")


def test_a_call_that_is_not_to_be_retried_has_failed(served: LocalServing) -> None:
    ref = durable(served, retries=5, retry_on=ValueError).fails.remote(9)

    assert isinstance(ref.exception(LIMIT_S), Broken)
    assert (ref.status().state, ref.status().attempts) == ("failed", 1)


def test_a_delay_ends_when_the_test_lets_time_pass(served: LocalServing) -> None:
    ref = durable(served, delay=3600).remote("later")
    assert ref.status().state == "scheduled"

    served.pass_time(3000)
    assert ref.status().state == "scheduled"
    served.pass_time(700)

    assert ref.result(LIMIT_S) == "done later"


def test_a_call_that_expires_before_it_is_due_does_not_run(served: LocalServing) -> None:
    ref = durable(served, delay=60, expires=30).remote("late")

    served.pass_time(61)

    assert isinstance(ref.exception(LIMIT_S), GetTimeoutError)
    assert ref.status().state == "expired"
    assert durable(served).look.remote().result(LIMIT_S) == []


@pytest.mark.parametrize("delay", [0, 60])
def test_a_call_can_be_cancelled_before_its_end(served: LocalServing, delay: float) -> None:
    ref = durable(served, delay=delay).waits.remote()
    other = serve.get_ref(ref.id)

    assert ref.cancel()

    assert isinstance(other.exception(LIMIT_S), CallCancelled)
    assert other.status().state == "cancelled"


def test_what_a_generator_yields_can_be_read_part_by_part(served: LocalServing) -> None:
    ref = durable(served).yields.remote()

    assert list(ref) == [1, 2, 3]
    assert ref.result(LIMIT_S) == [1, 2, 3]


def test_waiting_calls_fill_the_queue(served: LocalServing) -> None:
    for _ in range(3):
        durable(served, delay=60).remote("x")

    with pytest.raises(BackPressureError):
        durable(served).remote("one too many")


def test_what_cannot_be_sent_is_refused_as_elsewhere(served: LocalServing) -> None:
    with pytest.raises((ValueNotSerializable, TypeError)):
        durable(served).remote(threading.Lock())
    Jobs.delete()
    with pytest.raises(DeploymentNotFound):
        durable(served).remote("x")


@serve.deployment
class Asks:
    """Submits from asynchronous code."""

    def __init__(self, _jobs: Any) -> None:
        self.jobs = Jobs.get_handle(sync=False)

    async def __call__(self) -> Any:
        ref = await self.jobs.options(durable=True).remote("inner")
        return [await ref, (await ref.astatus()).state]


def test_asynchronous_code_submits_too() -> None:
    with local(Asks.bind(Jobs.bind())) as served:
        assert served.handle is not None
        assert served.handle.remote().result(LIMIT_S) == ["done inner", "done"]


# Tasks

CONFIG = TaskProcessorConfig(queue_name="videos", max_retries=1, failed_task_queue_name="failed")


@serve.deployment
@task_consumer(task_processor_config=CONFIG)
class Cutter:
    @task_handler(name="cut")
    def cut(self, name: str) -> str:
        if name == "bad":
            raise Broken(name)
        return f"cut {name}"


@serve.deployment
@task_consumer(task_processor_config=TaskProcessorConfig(queue_name="failed"))
class Failed:
    def __init__(self) -> None:
        self.taken: list[Any] = []

    @task_handler(name="cut")
    def cut(self, task_id: str, error: str, args: list[Any], kwargs: dict[str, Any], text: str) -> None:
        self.taken.append((task_id, error, args))

    def list(self) -> list[Any]:
        return self.taken


@serve.deployment
class Front:
    def __init__(self, cutter: Any, failed: Any) -> None:
        self.adapter = instantiate_adapter_from_config(CONFIG)

    async def __call__(self, name: str) -> str:
        return self.adapter.enqueue_task_sync("cut", args=[name]).id


def front() -> Application[Any]:
    return Front.bind(Cutter.bind(), Failed.bind())


def test_tasks_are_processed_and_tell_their_status() -> None:
    with local(front()) as served:
        adapter = instantiate_adapter_from_config(CONFIG)
        task = adapter.enqueue_task_sync("cut", args=["a"])
        serve.get_ref(task.id).result(LIMIT_S)
        assert (found := adapter.get_task_status_sync(task.id)).status == "SUCCESS"
        assert found.result == "cut a"

        assert served.handle is not None
        by_async_code = served.handle.remote("b").result(LIMIT_S)
        assert serve.get_ref(by_async_code).result(LIMIT_S) == "cut b"


def test_tasks_that_fail_for_good_go_to_their_queue() -> None:
    with local(front()) as served:
        adapter = instantiate_adapter_from_config(CONFIG)
        task = adapter.enqueue_task_sync("cut", args=["bad"])

        assert isinstance(serve.get_ref(task.id).exception(LIMIT_S), Broken)

        assert adapter.get_task_status_sync(task.id).status == "FAILURE"
        [failed] = [call for call in served.durable_calls() if call.deployment == "Failed"]
        serve.get_ref(failed.id).result(LIMIT_S)
        taken = serve.get_deployment("Failed").get_handle().list.remote().result(LIMIT_S)
        assert taken == [(task.id, "bad", ["bad"])]


def test_a_task_can_be_cancelled() -> None:
    with local(front()):
        adapter = instantiate_adapter_from_config(CONFIG)
        task = adapter.enqueue_task_sync("cut", args=["a"], countdown=60)

        assert adapter.cancel_task_sync(task.id)

        assert adapter.get_task_status_sync(task.id).status == "REVOKED"
        assert not adapter.cancel_task_sync(task.id)


MOMENT = datetime(2001, 2, 3, tzinfo=UTC)


@pytest.mark.parametrize(
    "options",
    [
        *({"countdown": None}, {"countdown": -5}, {"countdown": 0, "eta": None}, {"expires": None}),
        *({"eta": MOMENT}, {"eta": MOMENT.isoformat()}, {"eta": "2001-02-03"}, {"expires": 60}),
    ],
)
def test_a_task_that_is_due_runs(options: dict[str, Any]) -> None:
    with local(front()):
        task = instantiate_adapter_from_config(CONFIG).enqueue_task_sync("cut", args=["a"], **options)
        assert serve.get_ref(task.id).result(LIMIT_S) == "cut a"


@pytest.mark.parametrize("expires", [MOMENT, MOMENT.isoformat(), 0, -1.5])
def test_a_task_that_has_expired_is_taken_and_never_runs(expires: object) -> None:
    with local(front()):
        task = instantiate_adapter_from_config(CONFIG).enqueue_task_sync("cut", args=["a"], expires=expires)
        assert isinstance(serve.get_ref(task.id).exception(LIMIT_S), GetTimeoutError)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"countdown": "soon"}, "countdown must be a number of seconds, not 'soon'"),
        ({"eta": "tomorrow"}, "eta='tomorrow' is not a moment in the form of ISO 8601"),
        ({"eta": 5}, "eta must be a datetime, or the text of one in the form of ISO 8601, not 5"),
        ({"expires": MOMENT.date()}, "expires must be a datetime, or the text of one"),
        ({"expires": "never"}, "expires='never' is not a moment in the form of ISO 8601"),
        ({"expires": [1]}, r"expires must be a number of seconds, not \[1\]"),
    ],
)
def test_a_moment_that_is_none_is_told_of(options: dict[str, Any], text: str) -> None:
    with local(front()):
        adapter = instantiate_adapter_from_config(CONFIG)
        with pytest.raises((ValueError, TypeError), match=text):
            adapter.enqueue_task_sync("cut", args=["a"], **options)


# Schedules


def test_a_schedule_is_checked_and_makes_its_calls_as_time_passes(served: LocalServing) -> None:
    with pytest.raises(DeploymentNotFound):
        serve.schedule("never", "every 1h", serve.deployment(name="Nobody")(Broken), "x")
    in_half_an_hour = datetime.now(UTC) + timedelta(minutes=30)
    serve.schedule("hourly", f"{in_half_an_hour.minute} * * * *", Jobs, "tick")

    served.pass_time(60)
    assert served.durable_calls() == []
    served.pass_time(3600)
    [made] = served.durable_calls()
    assert serve.get_ref(made.id).result(LIMIT_S) == "done tick"

    serve.unschedule("hourly")
    served.pass_time(7200)
    assert len(served.durable_calls()) == 1


def test_a_schedule_that_is_declared_takes_effect_in_every_test_that_deploys_what_it_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans = [plan_call(name, "every 1h", Jobs.get_handle(), (name,), {}) for name in ("tick", "other")]
    monkeypatch.setattr(Declared, "plans", [plans[0], plans[1]._replace(deployment="Nobody")])
    for _ in range(2):
        with local(Jobs) as served:
            served.pass_time(3660)
            [made] = served.durable_calls()
            assert serve.get_ref(made.id).result(LIMIT_S) == "done tick"
