"""Gateways of their own beside an instance's, with other settings."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qserve.settings import Settings
from tests.support.processes import end_at_once
from tests.support.raw_http import Address
from tests.support.slowness import patience


@dataclass
class Gateway:
    """A running gateway process."""

    process: "subprocess.Popen[bytes]"
    ready: dict[str, Any]

    @property
    def address(self) -> Address:
        return Address.of(self.ready["url"])

    @property
    def admin(self) -> str:
        return str(self.ready["admin_url"])

    def output(self) -> bytes:
        """Everything on its standard output, after it has been told to stop."""
        self.process.send_signal(signal.SIGTERM)
        output, _ = self.process.communicate(timeout=patience(20))
        return output


@contextmanager
def gateway(settings: Settings, *arguments: str, **variables: object) -> Iterator[Gateway]:
    """Runs one on a free port; `ready` holds an error when it did not start."""
    reading, writing = os.pipe()
    environment = os.environ | {
        "QSERVE_REDIS_URL": settings.redis_url,
        "QSERVE_SECRET": settings.secret,
        "QSERVE_NAMESPACE": settings.namespace,
        **{name: str(value) for name, value in variables.items()},
    }
    command = [sys.executable, "-m", "qserve_gateway", "--port", "0", "--ready-file", f"/dev/fd/{writing}", *arguments]
    process = subprocess.Popen(
        command, env=environment, pass_fds=(writing,), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    os.close(writing)
    try:
        with os.fdopen(reading) as pipe:
            ready = json.loads(pipe.readline())
        yield Gateway(process, ready)
    finally:
        end_at_once(process)
