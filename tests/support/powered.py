"""A machine with a node and a gateway on it, which can lose its power."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator

import httpx
import psutil

from tests.support.serving import free_port
from tests.support.shell import Running, Shell
from tests.support.slowness import patience
from tests.support.waiting import wait_until


class Machine:
    """A node with a gateway, which can lose its power."""

    def __init__(self, shell: Shell) -> None:
        self.port = free_port()
        self.node = Running(shell, "start", "--gateway", "--port", str(self.port))
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=patience(30))

    def wait(self) -> None:
        wait_until(self._serves, 40, shows=lambda: self.node.output)

    def _serves(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return "/work" in self.http.get("/-/routes").text
        return False

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.node.process.pid)
            for each in [process, *process.children(recursive=True)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each.pid, signal.SIGKILL)
        self.node.process.wait(patience(20))
        self.http.close()


@contextlib.contextmanager
def machine(shell: Shell) -> Iterator[Machine]:
    started = Machine(shell)
    try:
        yield started
    finally:
        started.kill()


def deploy(shell: Shell, machine: Machine) -> None:
    try:
        done = shell.run("deploy", "app")
    except subprocess.TimeoutExpired:
        raise AssertionError(machine.node.output) from None
    assert done.returncode == 0, done
