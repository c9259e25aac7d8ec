"""Notices, from the heartbeat's thread, what keeps a replica from working: a blocked event loop, a check that hangs."""

import asyncio
import faulthandler
import logging
import os
import site
import sys
import sysconfig
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from qserve.broker.redis_errors import CommandRefused
from qserve.broker.server import redis_clients
from qserve.errors import QServeError
from qserve.wire.spec import STALLED, UNHEALTHY
from qserve_workers.calls.slots import Slots

logger = logging.getLogger(__name__)

_STALL_S = 1.0
"""A loop that stands still for so long is said to be blocked."""
_STDERR = 2

Publish = Callable[[redis_clients.Client, str, str], None]


class StallWatch:
    """Watches one replica. Made on its event loop, whose thread it looks at; `look` belongs to the heartbeat's thread.

    Args:
        tag: Tag of the replica.
        overdue_s: How long a health check has taken that takes too long, None if none does.
        publish: Lets everybody know a state and its reason.
    """

    def __init__(self, tag: str, slots: Slots, overdue_s: Callable[[], float | None], publish: Publish) -> None:
        self._tag = tag
        self._slots = slots
        self._overdue_s = overdue_s
        self._publish = publish
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._is_stalled = False

    def look(self, client: redis_clients.Client, blocked_s: float) -> None:
        """Say what is wrong, if something is; a replica whose health check hangs ends here.

        Args:
            blocked_s: How long the event loop has not done what it was asked to.
        """
        if (taken := self._overdue_s()) is not None:
            self._end(client, f"its check_health has not returned within {taken:.0f} s")
        if blocked_s < _STALL_S:
            self._is_stalled = False
        elif not self._is_stalled and (place := _place_of(sys._current_frames().get(self._thread))):
            self._is_stalled = True
            problem = (
                f"{self._what_runs()} has blocked the event loop for more than {_STALL_S:g} s, at {place}. "
                "No other call goes on meanwhile: make it `def`, so that it runs on a thread, or await what takes long"
            )
            logger.warning("Deployment %s: replica %s: %s", self._slots.spec.name, self._tag, problem)
            self._tell(client, STALLED, problem)

    def _what_runs(self) -> str:
        task = asyncio.current_task(self._loop)
        running = next((each for each in self._slots.calls if each.task is task), None)
        return "async code" if running is None else f"method {running.call.method or '__call__'}"

    def _end(self, client: redis_clients.Client, problem: str) -> None:
        logger.error("Deployment %s: replica %s ends: %s", self._slots.spec.name, self._tag, problem)
        self._tell(client, UNHEALTHY, problem)
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        os._exit(1)

    def _tell(self, client: redis_clients.Client, state: str, problem: str) -> None:
        try:
            self._publish(client, state, problem)
        except (QServeError, CommandRefused) as exc:
            logger.debug("could not tell that the replica is %s: %s", state, exc)


def _folders_of_libraries() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    found = [paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()]
    return tuple(f"{folder}/" for folder in found)


def _folders_of_qserve() -> tuple[str, ...]:
    specs = [find_spec(package) for package in ("qserve", "qserve_workers")]
    return tuple(f"{Path(spec.origin).parent}/" for spec in specs if spec is not None and spec.origin)


_LIBRARIES = _folders_of_libraries()
_OURS = (*_folders_of_qserve(), "<frozen")
_LOOPS = ("/asyncio/", "/uvloop/", "/threading.py", "/concurrent/futures/")


def _place_of(frame: FrameType | None) -> str:
    """Where user code stands, or else what it runs; "" if the loop runs nothing but itself."""
    fallback = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_OURS) and not any(part in file for part in _LOOPS):
            place = f"{file}, line {frame.f_lineno}, in {frame.f_code.co_name}"
            if not file.startswith(_LIBRARIES):
                return place
            fallback = fallback or place
        frame = frame.f_back
    return fallback
