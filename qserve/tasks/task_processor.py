"""Puts tasks onto their queue, and tells what has become of them."""

import asyncio
import datetime
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import cached_property
from typing import Any, Final

from qserve.calls.client import Client
from qserve.calls.durable_ref import DurableRef, attached_ref
from qserve.calls.handle import get_handle
from qserve.calls.handles.durable_handle import DurableHandle
from qserve.calls.handles.handle_codec import codec_of
from qserve.calls.process_client import ClientThread, current_client
from qserve.deployments.driver import THIS_PROCESS
from qserve.errors import DeploymentNotFound
from qserve.operating.overview import read_overview
from qserve.tasks.task_config import TaskProcessorConfig, TaskResult
from qserve.wire.call_record import CANCELLED, DONE, ENDS, RUNNING, is_call_id
from qserve.wire.spec import SERVING

_FOR_EVER: Final = 10**8
_ANSWER_S: Final = 10.0
_SHORTEST_S: Final = 0.001
_STATUS: Final = {DONE: "SUCCESS", CANCELLED: "REVOKED", RUNNING: "STARTED"}


class TaskProcessorAdapter:
    """The tasks of one queue. Thread-safe; made by `instantiate_adapter_from_config`.

    The methods that end in `_sync` block the thread that calls them for about a millisecond. They may be used on the
    event loop of a replica, too, where those that end in `_async` block nothing.
    """

    def __init__(self, config: TaskProcessorConfig) -> None:
        if not isinstance(config, TaskProcessorConfig):
            raise TypeError(f"an adapter takes a TaskProcessorConfig, not {config!r}")
        named = config.adapter if isinstance(config.adapter, str) else getattr(config.adapter, "__name__", "")
        if named.rpartition(".")[2] not in {"TaskProcessorAdapter", "CeleryTaskProcessorAdapter"}:
            raise TypeError(
                f"adapter {config.adapter!r} is not available in qserve: tasks are durable calls, which need no other "
                "broker. Leave `adapter` out"
            )
        self.config = config

    def enqueue_task_sync(
        self, task_name: str, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> TaskResult:
        """Put a task onto the queue, and return when Redis has it.

        Args:
            args, kwargs: The arguments of the handler.
            options: Celery's `countdown`, `eta` and `expires`, and the options of durable calls.

        Raises:
            DeploymentNotFound: No deployment consumes the queue.
            ValueError, TypeError: The one that does has no handler for the task, or an option is impossible.
            BackPressureError, BrokerUnavailable: The task was not taken.
        """
        client = self._client
        handle = self._handle(task_name, options)
        ref, admitted = handle._submit(tuple(args or ()), dict(kwargs or {}), client)
        admitted.result()
        return TaskResult(id=ref.id, status="PENDING", created_at=time.time())

    async def enqueue_task_async(
        self, task_name: str, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> TaskResult:
        """Like `enqueue_task_sync`."""
        handle = await asyncio.to_thread(self._handle, task_name, options)
        ref, admitted = handle._submit(tuple(args or ()), dict(kwargs or {}))
        await admitted
        return TaskResult(id=ref.id, status="PENDING", created_at=time.time())

    def get_task_status_sync(self, task_id: str) -> TaskResult:
        """How a task is doing, and its result if it has ended.

        Raises:
            CallNotFound: It ended so long ago that it is forgotten.
            ValueError: This is no id of a task.
            BrokerUnavailable: Redis cannot be asked.
        """
        client = self._client.of_call(task_id)
        found = _unattached(client, task_id).status()
        error: Any = None
        value: Any = None
        if found.state in ENDS:
            ref = attached_ref(client, codec_of(client), task_id)
            error = ref.exception(_ANSWER_S)
            value = ref.result(_ANSWER_S) if error is None else error
        return _result(found.state, found.attempts, found.submitted, task_id, value)

    async def get_task_status_async(self, task_id: str) -> TaskResult:
        """Like `get_task_status_sync`."""
        client = current_client().of_call(task_id)
        found = await _unattached(client, task_id).astatus()
        value: Any = None
        if found.state in ENDS:
            try:
                value = await attached_ref(client, codec_of(client), task_id)
            except Exception as exc:
                value = exc
        return _result(found.state, found.attempts, found.submitted, task_id, value)

    def cancel_task_sync(self, task_id: str) -> bool:
        """Cancel a task: one that waits never runs, one that runs is stopped if its handler is `async def`.

        Returns:
            False if it had ended before, or is not known.
        """
        return self._cancel(self._client, task_id).result(_ANSWER_S)

    async def cancel_task_async(self, task_id: str) -> bool:
        """Like `cancel_task_sync`."""
        return await asyncio.wrap_future(self._cancel(current_client(), task_id))

    def get_metrics_sync(self) -> dict[str, Any]:
        """For each deployment that consumes the queue: how much is queued and runs, and how fast."""
        state = THIS_PROCESS.current().state
        return {row["name"]: dict(row) for row in read_overview(state, list(self._consumers()))}

    async def get_metrics_async(self) -> dict[str, Any]:
        """Like `get_metrics_sync`."""
        return await asyncio.to_thread(self.get_metrics_sync)

    def health_check_sync(self) -> list[dict[str, Any]]:
        """Each replica that takes tasks of the queue, in the form of Celery's `ping`."""
        observed = THIS_PROCESS.current().state.observed
        replicas = [each for name in self._consumers() for each in observed.replicas(name).values()]
        return [{each.tag: {"ok": "pong"}} for each in replicas if each.state == SERVING]

    async def health_check_async(self) -> list[dict[str, Any]]:
        """Like `health_check_sync`."""
        return await asyncio.to_thread(self.health_check_sync)

    @property
    def _client(self) -> Client:
        client = current_client()
        return self._beside.client if client.is_own_thread() and not client.durable.confirms_at_once else client

    @cached_property
    def _beside(self) -> ClientThread:
        """A client on a thread, for code that may not block the loop of the one that this process has."""
        thread = ClientThread(Client(current_client().settings))
        thread.start()
        return thread

    def _consumers(self) -> dict[str, tuple[str, ...]]:
        """The names of the tasks that each deployment takes from the queue."""
        listed = THIS_PROCESS.current().state.list()
        return {
            name: each.spec.task_names
            for name, each in listed.items()
            if each.spec.task_queue == self.config.queue_name
        }

    def _handle(self, task_name: str, options: dict[str, Any]) -> DurableHandle:
        consumers = self._consumers()
        if not consumers:
            raise DeploymentNotFound(
                f"no deployment consumes the queue {self.config.queue_name!r}: deploy a class with @task_consumer and "
                "this queue_name first"
            )
        name = next((name for name, tasks in consumers.items() if task_name in tasks), None)
        if name is None:
            known = ", ".join(sorted(task for tasks in consumers.values() for task in tasks))
            raise ValueError(
                f"no handler for task {task_name!r} in queue {self.config.queue_name!r}; there are {known}"
            )
        retries = self.config.max_retries
        terms = {"retries": _FOR_EVER if retries is None else retries, **_terms(options)}
        return get_handle(name).options(durable=True, method_name=task_name, **terms)

    def _cancel(self, client: Client, task_id: str) -> "Future[bool]":
        client = client.of_call(task_id)
        ref, cancelled = _unattached(client, task_id), Future[bool]()

        def answered(answer: Any) -> None:
            with suppress(InvalidStateError):  # whoever asked has given up waiting
                if isinstance(answer, Exception):
                    cancelled.set_exception(answer)
                else:
                    cancelled.set_result(answer not in (b"ended", b"unknown"))

        client.run_soon(lambda: client.durable.by_id.cancel(ref.id, answered))
        return cancelled


CeleryTaskProcessorAdapter = TaskProcessorAdapter


def instantiate_adapter_from_config(task_processor_config: TaskProcessorConfig) -> TaskProcessorAdapter:
    """The adapter with which tasks are put onto the queue of a config. The queue need not be consumed yet.

    Raises:
        TypeError: This is no TaskProcessorConfig, or it names an adapter of another kind.
    """
    return TaskProcessorAdapter(task_processor_config)


def _unattached(client: Client, task_id: str) -> DurableRef[Any]:
    """A ref that asks, and does not wait."""
    if not isinstance(task_id, str) or not is_call_id(task_id):
        raise ValueError(f"{task_id!r} is not the id of a task: that is in `TaskResult.id`")
    return DurableRef(client, codec_of(client), task_id, f"task {task_id}")


def _result(state: str, attempts: int, submitted: float, task_id: str, value: Any) -> TaskResult:
    waiting = "RETRY" if attempts else "PENDING"
    status = _STATUS.get(state, "FAILURE" if state in ENDS else waiting)
    return TaskResult(id=task_id, status=status, created_at=submitted, result=value)


def _terms(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a durable call, from those of a task as Celery takes them."""
    terms = dict(options)
    countdown, eta, expires = (terms.pop(name, None) for name in ("countdown", "eta", "expires"))
    if countdown:
        terms["delay"] = max(_number("countdown", countdown), 0.0)
    elif eta is not None:
        terms["delay"] = max(_seconds_until("eta", eta), 0.0)
    if expires is not None:
        is_moment = isinstance(expires, str | datetime.date)
        terms["expires"] = _seconds_until("expires", expires) if is_moment else _number("expires", expires)
        if terms["expires"] <= 0:  # Celery takes such a task, too, and it never runs
            terms["expires"] = _SHORTEST_S
            terms["delay"] = max(terms.get("delay", 0.0), 2 * _SHORTEST_S)
    return terms


def _number(option: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise TypeError(f"{option} must be a number of seconds, not {given!r}")
    return given


def _seconds_until(option: str, given: Any) -> float:
    moment = given
    if isinstance(given, str):
        try:
            moment = datetime.datetime.fromisoformat(given)
        except ValueError:
            raise ValueError(f"{option}={given!r} is not a moment in the form of ISO 8601") from None
    if not isinstance(moment, datetime.datetime):
        raise TypeError(f"{option} must be a datetime, or the text of one in the form of ISO 8601, not {given!r}")
    if moment.tzinfo is None:  # Celery takes it for UTC, too
        moment = moment.replace(tzinfo=datetime.UTC)
    return (moment - datetime.datetime.now(datetime.UTC)).total_seconds()
