"""What Celery's result backend is told of the end of a call."""

from typing import Any

import msgspec
import pytest

from qserve.errors import ResultNotSerializable
from qserve_workers.celery_calls.celery_results import celery_result, failed_task


class Mute(Exception):
    """Its text cannot be had, and its arguments are no JSON."""

    def __str__(self) -> str:
        raise ZeroDivisionError


def told(outcome: bytes) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(outcome)
    return found


def test_a_result_is_json_or_an_error_that_says_so() -> None:
    assert told(b"{%b}" % celery_result({1: ("a",)}))["result"] == {"1": ["a"]}
    with pytest.raises(ResultNotSerializable, match="gets JSON"):
        celery_result(object())


def test_an_error_arrives_with_type_arguments_and_traceback() -> None:
    task = told(failed_task("task-1", ValueError("no", 3)))
    assert task["result"] == {"exc_type": "ValueError", "exc_message": ["no", 3], "exc_module": "builtins"}
    assert (task["status"], task["task_id"]) == ("FAILURE", "task-1")
    assert "ValueError: ('no', 3)" in task["traceback"]


def test_an_error_whose_text_cannot_be_had_is_told_all_the_same() -> None:
    (said,) = told(failed_task("task-1", Mute(object())))["result"]["exc_message"]
    assert "text cannot be had" in said


def test_a_text_that_json_cannot_hold_is_told_with_what_stands_for_it() -> None:
    """As names of files that are no UTF-8."""
    task = told(failed_task("task-1", ValueError("caf\udce9", 3)))
    assert task["result"]["exc_message"] == ["caf\\udce9", 3]
    assert "ValueError: ('caf" in task["traceback"]
