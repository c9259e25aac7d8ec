"""Calls from Celery clients: `send_task("qserve.call", args=[deployment, method, args, kwargs])`.

The worker's parent turns the message into a durable call. It never waits for the result: that is written for Celery's
result backend by whoever ends the call.
"""

import hashlib
import inspect
import logging
import uuid
from datetime import UTC, datetime
from typing import Any

import msgspec
from celery.exceptions import NotRegistered, TaskRevokedError

from qserve.broker.celery_lists import store_celery_result
from qserve.broker.instance.state import State
from qserve.broker.payloads import Payloads
from qserve.broker.records import submit_now
from qserve.errors import (
    BackPressureError,
    ConfigurationError,
    DeploymentNotFound,
    DeploymentUnavailable,
    MethodNotFound,
    QServeError,
)
from qserve.settings import Settings
from qserve.wire.call_record import ANYONE, NEVER_MS, RESULT_TTL_S, DurableCall, DurableOptions, Terms
from qserve.wire.codec import Codec
from qserve.wire.exceptions import plain_text
from qserve.wire.messages import PYTHON, Signer
from qserve.wire.names import is_name
from qserve_workers.celery_calls.celery_results import failed_task

logger = logging.getLogger(__name__)

TASK = "qserve.call"
"""The one task there is."""


class Wanted(msgspec.Struct):
    """The arguments of the task."""

    deployment: str
    method: str = ""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


_signature = inspect.signature(Wanted)
_FOLLOW = {"chain": "chain", "chord": "chord", "callbacks": "link", "errbacks": "link_error"}
"""What a Celery worker does after a task, as messages call it and as users do."""


class Desk:
    """Turns messages into durable calls. Synchronous: a step or two on Redis for each."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._allowed = settings.celery_calls if settings.celery_calls is not None else not settings.secrets
        self._signer = Signer(settings.secrets)
        self._state = State(settings.redis_url, settings.keys, self._signer)
        self._payloads = Payloads(settings.keys, self._signer, settings.out_of_line_bytes)
        self._codec = Codec(allow_pickle=False, max_bytes=settings.max_value_bytes)

    def close(self) -> None:
        """Close its connections."""
        self._state.close()

    def take(self, headers: dict[str, Any], body: Any) -> None:
        """Submit the call of a message; one that cannot be is a failed task.

        Args:
            headers, body: Of Celery's protocol 2.

        Raises:
            BrokerUnavailable, ConfigurationError, CommandRefused: Redis has not taken it; it is to be taken again.
        """
        try:
            task, (args, kwargs, embedded) = headers["id"], body
            if headers["task"] != TASK:
                raise NotRegistered(headers["task"])
            _refuse_what_follows(embedded)
            found = self._call(headers, str(task), self._wanted(args, kwargs))
        except (QServeError, NotRegistered, KeyError, TypeError, ValueError) as exc:
            self.refuse(headers, exc)
            return
        if found is None:
            return
        try:
            submit_now(self._state.redis, self._settings.keys, self._signer, self._payloads, *found)
        except (DeploymentNotFound, DeploymentUnavailable, BackPressureError) as exc:
            self.refuse(headers, exc)

    def refuse(self, headers: dict[str, Any], error: Exception) -> None:
        """Let the task of a message fail, as far as it has an id."""
        task = plain_text(headers.get("id", ""))
        logger.warning("task %s is no call: %s", task or "without an id", error)
        if task:
            self._end(task, error)

    def _wanted(self, args: Any, kwargs: Any) -> Wanted:
        if not self._allowed:
            raise ConfigurationError(
                "calls from Celery clients are not signed, and this instance signs its calls: set "
                "QSERVE_CELERY_CALLS=1 for its workers to take them all the same"
            )
        try:
            bound = _signature.bind(*args, **kwargs).arguments
            wanted = msgspec.convert({name: value for name, value in bound.items() if value is not None}, Wanted)
        except (TypeError, msgspec.ValidationError) as exc:
            raise TypeError(f"qserve.call takes deployment, method, args, kwargs: {exc}") from exc
        if not is_name(wanted.deployment):
            raise DeploymentNotFound(
                f"there is no deployment {wanted.deployment!r}: `qserve status` lists those that exist"
            )
        if wanted.method.startswith("_") and wanted.method != "__call__":
            raise MethodNotFound(f"the method {wanted.method!r} is private and cannot be called")
        return wanted

    def _call(self, headers: dict[str, Any], task: str, wanted: Wanted) -> tuple[DurableCall, DurableOptions] | None:
        """The durable call of a task, None if its time is over."""
        name = wanted.deployment
        payload = self._codec.pack_call(tuple(wanted.args), wanted.kwargs, f"the call to {name}")
        expires_s = _seconds_until(headers.get("expires"))
        if expires_s is not None and expires_s <= 0:
            self._end(task, TaskRevokedError("expired"), "REVOKED")
            return None
        terms = Terms(celery_id="" if headers.get("ignore_result") else task)
        method = "" if wanted.method == "__call__" else wanted.method
        head = (call_id_of(task), name, ANYONE, NEVER_MS, PYTHON, method, True, payload)
        expires_s = None if expires_s is None else max(expires_s, 0.001)
        options = DurableOptions(max(0.0, _seconds_until(headers.get("eta")) or 0.0), expires_s, terms=terms)
        return DurableCall(*head, terms=terms), options

    def _end(self, task: str, error: Exception, status: str = "FAILURE") -> None:
        meta, ttl_ms = failed_task(task, error, status), int(RESULT_TTL_S * 1000)
        store_celery_result(self._state.redis, self._settings.keys, task, call_id_of(task), meta, ttl_ms)


def _refuse_what_follows(embedded: Any) -> None:
    wanted = [name for what, name in _FOLLOW.items() if embedded.get(what)] if isinstance(embedded, dict) else []
    if wanted:
        raise ValueError(
            f"{TASK} does not run what is to follow a task ({', '.join(wanted)}), so the task was not run either: send "
            "the next one when this one has its result, or let a deployment make both calls"
        )


def call_id_of(task: str) -> str:
    """The id of the durable call of a Celery task: the same for the same task, so that none is submitted twice."""
    try:
        return "d" + uuid.UUID(task).hex
    except ValueError:
        return "d" + hashlib.sha256(task.encode()).hexdigest()[:32]


def _seconds_until(moment: Any) -> float | None:
    if not moment:
        return None
    at = datetime.fromisoformat(str(moment))
    return ((at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds()
