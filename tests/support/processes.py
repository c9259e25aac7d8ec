"""The processes of an instance, and raw connections to its gateway."""

import contextlib
import os
import socket
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import psutil

from qserve.broker.instance.state import State
from qserve.settings import Settings
from qserve.testing import TestInstance
from qserve.wire.messages import Signer
from tests.support.chosen_server import client_of
from tests.support.slowness import patience


def gateway_pid(instance: TestInstance) -> int:
    """The process that serves HTTP."""
    settings = instance.settings
    state = State(settings.redis_url, settings.keys, Signer(settings.secrets))
    try:
        return next(iter(state.observed.gateways().values())).pid
    finally:
        state.close()


def end_at_once(*processes: "subprocess.Popen[Any]") -> None:
    """Kill them. While coverage is measured they may end by themselves before, as what is killed is not counted."""
    if "COVERAGE_PROCESS_CONFIG" in os.environ:
        for process in processes:
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=patience(5))
    for process in processes:
        process.kill()
        process.communicate()


def command_line(process: psutil.Process) -> str:
    """What it was started with, in one line: empty once it has ended, between two looks too."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def valkey_pid(settings: Settings, deployment: str) -> int:
    """The process that carries the calls of a deployment."""
    with client_of(settings.keys.of(deployment).address(settings.redis_url)) as client:
        found: Any = client.info("server")
        return int(found["process_id"])


def pss_mib(pid: int) -> float:
    """The memory that is this process' share."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"process {pid} has no memory")


class PeakMemory:
    """How far the memory of some processes together rises meanwhile."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._start = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.extra_mib = 0.0

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _now(self) -> float:
        return sum(map(pss_mib, self._pids))

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.extra_mib = max(self.extra_mib, self._now() - self._start)


def connect(instance: TestInstance, request: bytes) -> socket.socket:
    """A raw connection on which a request has been sent; `HOST` in it stands for the gateway's."""
    parts = urlsplit(instance.url)
    assert parts.hostname
    assert parts.port
    connection = socket.create_connection((parts.hostname, parts.port), timeout=patience(30))
    connection.sendall(request.replace(b"HOST", parts.netloc.encode()))
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    """Everything that still comes."""
    received = b""
    while True:
        try:
            data = connection.recv(65536)
        except ConnectionResetError:
            return received
        if not data:
            return received
        received += data


def read_until(connection: socket.socket, text: bytes) -> bytes:
    """What comes up to and with the first piece that completes `text`."""
    received = b""
    while text not in received:
        data = connection.recv(65536)
        assert data, received
        received += data
    return received


def own_pid() -> int:
    """For deployments: the replica's process."""
    return os.getpid()
