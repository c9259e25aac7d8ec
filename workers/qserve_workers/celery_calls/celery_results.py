"""What Celery's result backend for Redis is told of the end of a call that a Celery client has submitted.

JSON without its braces: Celery's state and the task's id are added where the end is written (lua/shared_records.lua).
"""

from datetime import UTC, datetime
from typing import Any

import msgspec

from qserve.errors import ResultNotSerializable, TaskError, failure_of
from qserve.wire.call_record import DurableCall
from qserve.wire.exceptions import plain_text, text_of, traceback_of


def celery_result(value: object) -> bytes:
    """Of a call that has returned a value.

    Raises:
        ResultNotSerializable: JSON cannot say it.
    """
    try:
        return _outcome(msgspec.to_builtins(value, str_keys=True), "")
    except (TypeError, ValueError) as exc:
        raise ResultNotSerializable(f"the result cannot be sent to a Celery client, which gets JSON: {exc}") from exc


def celery_error(call: DurableCall, error: BaseException) -> bytes:
    """Of a call that has failed; nothing for one that did not come from Celery."""
    return _failure(error) if call.terms.celery_id else b""


def failed_task(task: str, error: BaseException, status: str = "FAILURE") -> bytes:
    """What the result backend has of a task that never became a call."""
    rest = b'"status":"%b","children":[],"task_id":%b' % (status.encode(), msgspec.json.encode(task))
    return b"{%b,%b}" % (_failure(error), rest)


def _failure(error: BaseException) -> bytes:
    name, module = type(error).__qualname__, type(error).__module__
    if isinstance(error, TaskError) and (failure := failure_of(error)).type_name:
        name, module = failure.type_name, failure.module
    said: list[object] = [plain_text(each) if isinstance(each, str) else each for each in error.args]
    if not all(isinstance(each, str | int | float) for each in said):
        said = [text_of(error)]
    facts = {"exc_type": name, "exc_message": said, "exc_module": module}
    return _outcome(facts, traceback_of(error))


def _outcome(result: Any, text: str) -> bytes:
    outcome = {"result": result, "traceback": text or None, "date_done": datetime.now(UTC).isoformat()}
    return msgspec.json.encode(outcome)[1:-1]
