"""What `@task_consumer` and `@task_handler` make of a class, and what they refuse."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from qserve import serve
from qserve.tasks import TaskProcessorAdapter, TaskProcessorConfig, task_consumer, task_handler
from qserve.wire.codec import Codec

CONFIG = TaskProcessorConfig(queue_name="q")


def test_a_consumer_is_an_ordinary_class_whose_deployment_knows_its_tasks() -> None:
    @task_consumer(task_processor_config=CONFIG)
    class Consumer:
        @task_handler(name="a.b")
        def first(self, x: int) -> int:
            return x + 1

        @task_handler
        async def second(self) -> None: ...

        def other(self) -> None: ...

    assert Consumer().first(1) == getattr(Consumer(), "a.b")(1) == 2
    spec = serve.deployment(Consumer).to_spec(Codec(allow_pickle=True, max_bytes=2**20))
    assert (spec.task_queue, spec.task_names) == ("q", ("a.b", "second"))


def no_handler() -> None:
    @task_consumer(task_processor_config=CONFIG)
    class Consumer:
        def work(self) -> None: ...


def two_of_a_name() -> None:
    @task_consumer(task_processor_config=CONFIG)
    class Consumer:
        @task_handler(name="x")
        def first(self) -> None: ...

        @task_handler(name="x")
        def second(self) -> None: ...


def wrong_way_round() -> None:
    @task_consumer(task_processor_config=CONFIG)
    @serve.deployment
    class Consumer:  # type: ignore[type-var]
        @task_handler
        def work(self) -> None: ...


def no_config() -> None:
    task_consumer(task_processor_config={"queue_name": "q"})  # type: ignore[arg-type]


def own_adapter() -> None:
    TaskProcessorAdapter(TaskProcessorConfig(queue_name="q", adapter="my.Adapter"))


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (no_handler, "Consumer has no handler: mark its methods with @task_handler."),
        (two_of_a_name, "Consumer has two methods for task 'x'"),
        (wrong_way_round, "@task_consumer expects a class, and @serve.deployment above it"),
        (no_config, "@task_consumer takes a TaskProcessorConfig"),
        (own_adapter, "adapter 'my.Adapter' is not available in qserve"),
        (lambda: task_handler(name=" "), "Task name must be a non-empty string"),
        (lambda: task_handler(name="_x"), "Task name must be a non-empty string that does not begin with '_'"),
        (lambda: task_handler(7), "@task_handler expects a method, not 7"),  # type: ignore[call-overload]
        (lambda: TaskProcessorConfig(queue_name=""), "queue_name"),
    ],
)
def test_a_mistake_is_told_where_it_is_made(mistake: Callable[[], Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(text)):
        mistake()
