"""Celery's queue on Redis, read without taking a message off it before there is a record of its call.

kombu pops a message and notes in a second step that it has it: a worker that is killed in between takes it along. Here
a message stays in its list until it is a durable call. Read twice it is one call, for that has its id from the task.
"""

import base64
import contextlib
import json
import logging
import secrets
import time
from typing import Any

from kombu.message import Message

from qserve.background import until_next
from qserve.broker.celery_lists import CeleryLists
from qserve.broker.redis_errors import CommandRefused
from qserve.errors import BrokerUnavailable, ConfigurationError
from qserve.failpoints import reach
from qserve.settings import Settings
from qserve_workers.celery_calls.celery_tasks import Desk

logger = logging.getLogger(__name__)

QUEUE = "qserve"
"""The queue that Celery clients send tasks to."""
_LOOK_EVERY_S, _OTHERS_LOOK_EVERY_S = 1.0, 5.0
_NEW_FOR_S = 5.0
"""So long a worker that has just started looks as often as the reader: it may come in place of one that was killed."""
_REST_S = 3.0
"""How long a server is left alone that does not answer: the worker has children to look after."""
_OVERDUE_S = 10.0
_AT_ONCE = 32
"""Messages taken before others of the loop have their turn."""
_TROUBLES = (BrokerUnavailable, ConfigurationError, CommandRefused)
"""What a command raises that Redis has not carried out; the messages are read again later."""


class CeleryQueue:
    """Reads the queue for the whole instance while it has the lease; else sees now and then whether that is free.

    Belongs to the worker's event loop, Celery's hub.
    """

    def __init__(self, settings: Settings) -> None:
        self._desk = Desk(settings)
        self._lists = CeleryLists(settings.redis_url, settings.keys, QUEUE, secrets.token_hex(8))
        self._hub: Any = None
        self._timer: Any = None
        self._has_lease = False
        self._waits_since = 0.0
        self._is_troubled = False
        self._rests_until = 0.0
        self._new_until = 0.0

    def start(self, hub: Any) -> None:
        """Begin to read."""
        self._hub = hub
        self._new_until = time.monotonic() + _NEW_FOR_S
        self._timer = hub.call_later(0, self._look_again_and_again)

    def stop(self) -> None:
        """Leave the rest to others."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wait_no_more()
        with contextlib.suppress(*_TROUBLES):
            self._lists.release_lease()
        self._lists.close()
        self._desk.close()

    def _look_again_and_again(self) -> None:
        self._look()
        looks_often = self._has_lease or time.monotonic() < self._new_until
        pause = until_next(_LOOK_EVERY_S if looks_often else _OTHERS_LOOK_EVERY_S)
        self._timer = self._hub.call_later(pause, self._look_again_and_again)

    def _look(self) -> None:
        if self._timer is None or time.monotonic() < self._rests_until:
            return
        try:
            self._has_lease = self._lists.hold_lease()
            if not self._has_lease:
                self._wait_no_more()
                return
            if self._lists.is_waiting and time.monotonic() - self._waits_since > _OVERDUE_S:
                self._wait_no_more()
            self._take_some()  # also while it waits: that is for the most urgent list only
        except _TROUBLES as exc:
            self._wait_no_more()
            self._note(exc)

    def _note(self, error: Exception) -> None:
        if not self._is_troubled:
            logger.warning("Celery's queue cannot be read for now: %s", error)
        self._is_troubled = True
        self._rests_until = time.monotonic() + _REST_S

    def _take_some(self) -> None:
        found = self._lists.oldest(_AT_ONCE)
        if found is None:
            if not self._lists.is_waiting:
                self._hub.add_reader(self._lists.wait(), self._answered)
                self._waits_since = time.monotonic()
            return
        name, messages = found
        for raw in messages:
            reach("celery-read")
            self._take(raw)
        reach("celery-taken")
        self._lists.remove(name, messages)
        self._hub.call_soon(self._look)

    def _take(self, raw: bytes) -> None:
        try:
            payload = json.loads(raw)
            headers, properties = dict(payload["headers"]), payload["properties"]
            body = payload["body"]
            body = base64.b64decode(body) if properties.get("body_encoding") == "base64" else body
            described = {"content_type": payload["content-type"], "content_encoding": payload["content-encoding"]}
            message: Any = Message(body, headers=headers, accept={"application/json"}, **described)  # type: ignore[no-untyped-call]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as exc:
            logger.warning("dropped what was no message in Celery's queue: %r", exc)
            return
        try:
            self._desk.take(headers, message.decode())
        except _TROUBLES:
            raise
        except Exception as exc:  # whatever it is: a message that stays would be read again for ever
            self._desk.refuse(headers, exc)

    def _answered(self) -> None:
        self._hub.remove_reader(self._lists.descriptor)
        try:
            self._lists.take_answer()
        except _TROUBLES as exc:
            self._note(exc)  # the timer looks again, in a while
        else:
            self._is_troubled = False
            self._hub.call_soon(self._look)

    def _wait_no_more(self) -> None:
        if (descriptor := self._lists.descriptor) >= 0:
            self._hub.remove_reader(descriptor)
        self._lists.stop_waiting()
