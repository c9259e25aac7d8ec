"""Which queue tasks stand in and what becomes of those that fail, and how a task is doing."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt


class CeleryAdapterConfig(BaseModel):
    """Taken because Ray Serve has it, and without effect: tasks are durable calls, and stand in the Redis of the
    instance."""

    model_config = ConfigDict(extra="allow")

    broker_url: str = ""
    backend_url: str = ""


class TaskProcessorConfig(BaseModel):
    """How the tasks of a queue are processed.

    Attributes:
        queue_name: The name of the queue; a deployment consumes it by `@task_consumer`.
        adapter, adapter_config: Without effect, but an adapter of another kind than Celery's is refused.
        max_retries: How often a task may run again after it raised; None: until it succeeds.
        failed_task_queue_name: A task that has failed for good is put there too, if a deployment consumes that queue.
            Its handler of the same name gets the id, the text of the error, args, kwargs, and the traceback.
        unprocessable_task_queue_name: Without effect: a task for which there is no handler is not taken.
    """

    model_config = ConfigDict(extra="forbid")

    queue_name: str = Field(min_length=1)
    adapter: Any = "CeleryTaskProcessorAdapter"
    adapter_config: Any = None
    max_retries: NonNegativeInt | None = 3
    failed_task_queue_name: str | None = None
    unprocessable_task_queue_name: str | None = None


class TaskResult(BaseModel):
    """A task as it was when somebody asked.

    Attributes:
        id: Its id, as a durable call: `serve.get_ref(id)` and `/-/calls/<id>` know it, too.
        status: "PENDING", "STARTED", "RETRY" (it failed, and will run again), "SUCCESS", "FAILURE" or "REVOKED"
            (cancelled).
        created_at: Unix time at which it was enqueued.
        result: What the handler returned, or the exception that it raised last.
    """

    id: str
    status: str
    created_at: float | None = None
    result: Any = None
