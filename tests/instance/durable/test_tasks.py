"""Tasks in Ray Serve's form: enqueued, run, retried, cancelled, and what is told of them."""

import asyncio
import datetime
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from qserve import serve
from qserve.calls.process_client import current_client
from qserve.errors import CallNotFound, DeploymentNotFound, GetTimeoutError
from qserve.tasks import (
    CeleryAdapterConfig,
    TaskProcessorAdapter,
    TaskProcessorConfig,
    TaskResult,
    instantiate_adapter_from_config,
    task_consumer,
    task_handler,
)
from qserve.testing import TestInstance
from tests.support.gates import Gate, Notes
from tests.support.waiting import until

CONFIG = TaskProcessorConfig(
    queue_name="videos",
    adapter_config=CeleryAdapterConfig(broker_url="redis://unused:6379/0", backend_url="redis://unused:6379/1"),
    max_retries=1,
    failed_task_queue_name="failed videos",
)
FAILED = TaskProcessorConfig(queue_name="failed videos")
api = FastAPI()


@serve.deployment(name="Videos", route_prefix=None)
@task_consumer(task_processor_config=CONFIG)
class Videos:
    def __init__(self, gate: Gate, notes: Notes) -> None:
        self.gate, self.notes = gate, notes

    @task_handler(name="cut.video")
    def cut(self, name: str, seconds: int = 1) -> str:
        self.notes.add(f"cut {name}")
        return f"{seconds} s of {name}"

    @task_handler
    async def upload(self, name: str) -> None:
        self.notes.add(f"upload {name}")
        await self.gate.passed()

    @task_handler
    async def fail(self, name: str) -> None:
        self.notes.add(f"fail {name}")
        raise LookupError(f"no {name}")


@serve.deployment(name="FailedVideos", route_prefix=None)
@task_consumer(task_processor_config=FAILED)
class FailedVideos:
    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    @task_handler
    def fail(self, task_id: str, error: str, args: list[Any], kwargs: dict[str, Any], text: str) -> None:
        self.notes.add(f"failed {error} {args} {kwargs} {task_id} {'LookupError' in text}")


@serve.deployment(name="VideoApi", route_prefix="/videos")
@serve.ingress(api)
class Api:
    def __init__(self) -> None:
        self.adapter = instantiate_adapter_from_config(task_processor_config=CONFIG)

    @api.post("/")
    def submit(self, name: str) -> TaskResult:
        return self.adapter.enqueue_task_sync(task_name="cut.video", args=[name])

    @api.post("/on-the-loop")
    async def submit_on_the_loop(self, name: str) -> TaskResult:
        return self.adapter.enqueue_task_sync(task_name="cut.video", args=[name], kwargs={"seconds": 3})

    @api.get("/{task_id}")
    async def status(self, task_id: str) -> TaskResult:
        return self.adapter.get_task_status_sync(task_id)


@pytest.fixture
def adapter(qserve_instance: TestInstance, gate: Gate, notes: Notes) -> TaskProcessorAdapter:
    """The consumers are deployed."""
    serve.run([Videos.options(init_args=(gate, notes)), FailedVideos.options(init_args=(notes,)), Api])
    return instantiate_adapter_from_config(CONFIG)


def ended(adapter: TaskProcessorAdapter, task_id: str) -> TaskResult:
    found: list[TaskResult] = []

    async def look() -> bool:
        found.append(await asyncio.to_thread(adapter.get_task_status_sync, task_id))
        return found[-1].status in {"SUCCESS", "FAILURE", "REVOKED"}

    async def wait() -> None:
        while not await look():  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(wait(), 30))
    return found[-1]


def test_tasks_run_and_are_followed_from_programs_and_from_replicas(
    adapter: TaskProcessorAdapter, http: httpx.Client, gate: Gate, notes: Notes
) -> None:
    done = ended(adapter, adapter.enqueue_task_sync("cut.video", args=["cat"], kwargs={"seconds": 2}).id)
    assert (done.status, done.result) == ("SUCCESS", "2 s of cat")

    for path in ("/videos/", "/videos/on-the-loop"):
        task = http.post(path, params={"name": "dog"}).json()
        assert task["status"] == "PENDING"
        assert ended(adapter, task["id"]).status == "SUCCESS"
        assert http.get(f"/videos/{task['id']}").json()["result"].endswith("s of dog")

    (row,) = adapter.get_metrics_sync().values()
    assert (row["name"], row["serving"]) == ("Videos", 1)
    assert [list(each.values()) for each in adapter.health_check_sync()] == [[{"ok": "pong"}]]


def test_a_task_that_keeps_failing_is_a_dead_letter_and_goes_to_the_queue_for_failed_ones(
    adapter: TaskProcessorAdapter, notes: Notes
) -> None:
    task = adapter.enqueue_task_sync("fail", ["cat"], backoff=0.01)
    failed = ended(adapter, task.id)

    assert failed.status == "FAILURE"
    assert isinstance(failed.result, LookupError)
    expected = ["fail cat", "fail cat", f"failed no cat ['cat'] {{}} {task.id} True"]
    asyncio.run(until(lambda: sorted(notes.read()) == sorted(expected)))
    assert serve.get_ref(task.id).status().state == "dead"


async def test_tasks_are_cancelled_and_put_off(adapter: TaskProcessorAdapter, gate: Gate, notes: Notes) -> None:
    running = await adapter.enqueue_task_async("upload", ["cat"])
    await until(lambda: notes.read() == ["upload cat"])
    assert (await adapter.get_task_status_async(running.id)).status == "STARTED"
    tomorrow = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    later = await adapter.enqueue_task_async("upload", ["dog"], eta=tomorrow)
    assert (await adapter.get_task_status_async(later.id)).status == "PENDING"

    for each in (running, later):
        assert await adapter.cancel_task_async(each.id)
        assert (await asyncio.to_thread(ended, adapter, each.id)).status == "REVOKED"
        assert not await adapter.cancel_task_async(each.id)
    assert notes.read() == ["upload cat"]


async def test_who_gives_up_waiting_for_a_cancellation_costs_nobody_the_connection(
    adapter: TaskProcessorAdapter, notes: Notes
) -> None:
    task = await adapter.enqueue_task_async("upload", ["dog"], countdown=3600)
    losses = current_client().link.losses
    given_up = asyncio.ensure_future(adapter.cancel_task_async(task.id))
    await asyncio.sleep(0)  # it is asked, and answered on another thread
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up

    assert (await asyncio.to_thread(ended, adapter, task.id)).status == "REVOKED"
    assert current_client().link.losses == losses


def test_a_task_that_has_expired_is_taken_and_never_runs(adapter: TaskProcessorAdapter, notes: Notes) -> None:
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    expired = ended(adapter, adapter.enqueue_task_sync("upload", ["cat"], expires=yesterday).id)
    assert isinstance(expired.result, GetTimeoutError)
    assert notes.read() == []


def test_mistakes_are_told_when_a_task_is_enqueued(adapter: TaskProcessorAdapter) -> None:
    with pytest.raises(ValueError, match=r"no handler for task 'paint' .*; there are cut.video, fail, upload"):
        adapter.enqueue_task_sync("paint")
    nobody = instantiate_adapter_from_config(TaskProcessorConfig(queue_name="nobody's"))
    with pytest.raises(DeploymentNotFound, match='no deployment consumes the queue "nobody\'s"'):
        nobody.enqueue_task_sync("paint")
    with pytest.raises(ValueError, match="not the id of a task"):
        adapter.get_task_status_sync("7")
    with pytest.raises(CallNotFound):
        adapter.get_task_status_sync("d" + "0" * 32)
    with pytest.raises(TypeError, match="options"):
        adapter.enqueue_task_sync("upload", ["cat"], routing_key="x")
