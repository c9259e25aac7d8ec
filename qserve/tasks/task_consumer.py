"""`@task_consumer`: a deployment whose methods are the handlers of the tasks of a queue."""

import asyncio
import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, Final, TypeVar, overload

from qserve.context import current_call, is_last_attempt
from qserve.deployments.loading import Deployable
from qserve.errors import DeploymentNotFound
from qserve.tasks.task_config import TaskProcessorConfig
from qserve.tasks.task_processor import TaskProcessorAdapter
from qserve.wire.exceptions import text_of, traceback_of

logger = logging.getLogger(__name__)

_HANDLES: Final = "_qserve_handles_task"
"""The attribute of a handler: the name of its tasks."""

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type[Any])


@overload
def task_handler(function: F, /) -> F: ...
@overload
def task_handler(*, name: str | None = None) -> Callable[[F], F]: ...
def task_handler(function: Any = None, /, *, name: str | None = None) -> Any:
    """Make a method of a `@task_consumer` class the handler of the tasks of a name.

    Args:
        name: Their name; not given: that of the method.

    Raises:
        ValueError: There can be no tasks of that name.
    """
    if name is not None and (not isinstance(name, str) or not name.strip() or name.startswith("_")):
        raise ValueError(f"Task name must be a non-empty string that does not begin with '_', got {name!r}.")

    def decorate(function: F) -> F:
        if not inspect.isfunction(function):
            raise TypeError(f"@task_handler expects a method, not {function!r}.")
        setattr(function, _HANDLES, name or function.__name__)
        return function

    return decorate if function is None else decorate(function)


def task_consumer(*, task_processor_config: TaskProcessorConfig) -> Callable[[C], C]:
    """Make a class the consumer of a queue; `@serve.deployment` stands above it.

    Each method with `@task_handler` runs the tasks of its name, as durable calls: at least once, and again after it
    raised, as often as the config says. Tasks that fail for good are dead letters of the deployment (`qserve dead`).
    `def` handlers run one at a time in each replica, unless the deployment has more `max_threads`; `async def` handlers
    run side by side. The methods can be called through a handle as well.

    Raises:
        TypeError, ValueError: The class has no handlers, or two of one name.
    """
    config = task_processor_config
    if not isinstance(config, TaskProcessorConfig):
        raise TypeError(f"@task_consumer takes a TaskProcessorConfig, not {config!r}.")
    TaskProcessorAdapter(config)  # says now what is wrong with it
    failed = None if config.failed_task_queue_name is None else _FailedTasks(config)

    def decorate(cls: C) -> C:
        if isinstance(cls, Deployable) or not inspect.isclass(cls):
            raise TypeError(f"@task_consumer expects a class, and @serve.deployment above it, not {cls!r}.")
        names = []
        for method_name, function in inspect.getmembers(cls, inspect.isfunction):
            task_name = getattr(function, _HANDLES, None)
            if task_name is None:
                continue
            if task_name in names or (task_name != method_name and hasattr(cls, task_name)):
                raise ValueError(f"{cls.__name__} has two methods for task {task_name!r}, or another use of that name.")
            names.append(task_name)
            setattr(cls, task_name, function if failed is None else failed.handler(function, task_name))
        if not names:
            raise ValueError(f"{cls.__name__} has no handler: mark its methods with @task_handler.")
        cls.__qserve_tasks__ = (config.queue_name, tuple(names))  # type: ignore[attr-defined]
        return cls

    return decorate


class _FailedTasks:
    """The queue to which tasks go that have failed for good."""

    def __init__(self, config: TaskProcessorConfig) -> None:
        self._queue = config.failed_task_queue_name
        self._adapter = TaskProcessorAdapter(config.model_copy(update={"queue_name": self._queue}))

    def handler(self, function: Callable[..., Any], task_name: str) -> Callable[..., Any]:
        """A handler that also puts its failed tasks there."""
        if inspect.iscoroutinefunction(function):

            @wraps(function)
            async def run_async(self_: Any, *args: Any, **kwargs: Any) -> Any:
                try:
                    return await function(self_, *args, **kwargs)
                except Exception as exc:
                    await asyncio.to_thread(self._take, task_name, exc, args, kwargs)
                    raise

            return run_async

        @wraps(function)
        def run(self_: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return function(self_, *args, **kwargs)
            except Exception as exc:
                self._take(task_name, exc, args, kwargs)
                raise

        return run

    def _take(self, task_name: str, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = current_call.get()
        if call is None or not is_last_attempt():
            return
        try:
            self._adapter.enqueue_task_sync(
                task_name, [call.request_id, text_of(error), list(args), kwargs, traceback_of(error)]
            )
        except DeploymentNotFound as exc:
            logger.info("A failed task stays a dead letter only: %s", exc)
        except Exception:
            logger.exception("A failed task could not be put onto queue %s", self._queue)
