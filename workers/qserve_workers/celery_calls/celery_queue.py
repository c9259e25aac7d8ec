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

import redis
from kombu.message import Message

from qserve.broker import redis_clients
from qserve.failpoints import reach
from qserve.settings import Settings
from qserve_workers.celery_calls.celery_tasks import Desk

logger = logging.getLogger(__name__)

QUEUE = "qserve"
"""The queue that Celery clients send tasks to."""
_PRIORITIES = ("", "\x06\x163", "\x06\x166", "\x06\x169")
"""Ends of the names of its lists, as kombu has them; the first is the most urgent, and what stands in it has none."""
_LOOK_EVERY_S = 1.0
_LEASE_MS = 3000
_ANSWER_S = 2.0
"""The worker has children to look after: it does not wait for a frozen server longer than that."""
_REST_S = 3.0
"""And leaves it alone for so long afterwards."""
_BLOCK_S, _OVERDUE_S = 5, 10.0
_AT_ONCE = 32
"""Messages taken before others of the loop have their turn."""

_LEASE = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class CeleryQueue:
    """Reads the queue for the whole instance while it has the lease; else sees every second whether that is free.

    Belongs to the worker's event loop, Celery's hub.
    """

    def __init__(self, settings: Settings) -> None:
        self._desk = Desk(settings)
        self._id = secrets.token_hex(8)
        self._redis = redis_clients.client(settings.redis_url, _ANSWER_S)
        self._lists = [f"{settings.keys.celery_prefix}{QUEUE}{priority}" for priority in _PRIORITIES]
        self._lease = f"{settings.keys.celery_prefix}{QUEUE}.reader"
        self._hub: Any = None
        self._timer: Any = None
        self._waiting: Any = None
        self._waits_since = 0.0
        self._is_troubled = False
        self._rests_until = 0.0

    def start(self, hub: Any) -> None:
        """Begin to read."""
        self._hub = hub
        self._timer = hub.call_repeatedly(_LOOK_EVERY_S, self._look)
        hub.call_soon(self._look)

    def stop(self) -> None:
        """Leave the rest to others."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wait_no_more()
        with contextlib.suppress(redis.RedisError, OSError):
            self._redis.eval(_RELEASE, 1, self._lease, self._id)
        self._redis.close()
        self._desk.close()

    def _look(self) -> None:
        if self._timer is None or time.monotonic() < self._rests_until:
            return
        try:
            if not self._redis.eval(_LEASE, 1, self._lease, self._id, _LEASE_MS):
                self._wait_no_more()
                return
            if self._waiting is not None and time.monotonic() - self._waits_since > _OVERDUE_S:
                self._wait_no_more()
            self._take_some()  # also while it waits: that is for the most urgent list only
        except (redis.RedisError, OSError) as exc:
            self._wait_no_more()
            self._note(exc)

    def _note(self, error: Exception) -> None:
        if not self._is_troubled:
            logger.warning("Celery's queue cannot be read for now: %s", error)
        self._is_troubled = True
        self._rests_until = time.monotonic() + _REST_S

    def _take_some(self) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for name in self._lists:
            pipeline.lrange(name, -_AT_ONCE, -1)
        found = [(name, raws) for name, raws in zip(self._lists, pipeline.execute(), strict=True) if raws]
        if not found:
            if self._waiting is None:
                self._wait()
            return
        name, raws = found[0]
        for raw in reversed(raws):
            reach("celery-read")
            self._take(raw)
        reach("celery-taken")
        pipeline = self._redis.pipeline(transaction=False)
        for raw in reversed(raws):
            pipeline.lrem(name, -1, raw)
        pipeline.execute()
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
        except (redis.RedisError, OSError):
            raise
        except Exception as exc:  # whatever it is: a message that stays would be read again for ever
            self._desk.refuse(headers, exc)

    # Waiting for the next message

    def _wait(self) -> None:
        """Have the server say when there is one: a list moved onto itself stays as it is."""
        urgent = self._lists[0]
        waiting: Any = self._redis.connection_pool.get_connection()
        try:
            waiting.send_command("BLMOVE", urgent, urgent, "RIGHT", "RIGHT", _BLOCK_S)
        except BaseException:
            self._redis.connection_pool.release(waiting)
            raise
        self._waiting, self._waits_since = waiting, time.monotonic()
        self._hub.add_reader(waiting._sock.fileno(), self._answered)

    def _answered(self) -> None:
        waiting, self._waiting = self._waiting, None
        self._hub.remove_reader(waiting._sock.fileno())
        try:
            waiting.read_response()
        except (redis.RedisError, OSError) as exc:
            waiting.disconnect()
            self._note(exc)  # the timer looks again, in a while
        else:
            self._is_troubled = False
            self._hub.call_soon(self._look)
        finally:
            self._redis.connection_pool.release(waiting)

    def _wait_no_more(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            if waiting._sock is not None:
                self._hub.remove_reader(waiting._sock.fileno())
            waiting.disconnect()
            self._redis.connection_pool.release(waiting)
