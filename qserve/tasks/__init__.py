"""Tasks in Ray Serve's form, made of durable calls: what Ray has in `serve.schema`, `task_consumer` and
`task_processor`."""

from qserve.tasks.task_config import CeleryAdapterConfig, TaskProcessorConfig, TaskResult
from qserve.tasks.task_consumer import task_consumer, task_handler
from qserve.tasks.task_processor import (
    CeleryTaskProcessorAdapter,
    TaskProcessorAdapter,
    instantiate_adapter_from_config,
)

__all__ = [
    "CeleryAdapterConfig",
    "CeleryTaskProcessorAdapter",
    "TaskProcessorAdapter",
    "TaskProcessorConfig",
    "TaskResult",
    "instantiate_adapter_from_config",
    "task_consumer",
    "task_handler",
]
