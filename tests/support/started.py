"""An instance that `qserve start` runs on a server of the test's own, with calls from this process to it."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qserve.calls import process_client
from tests.support.servers import SECRET
from tests.support.serving import free_port
from tests.support.shell import Running, Shell
from tests.support.slowness import patience
from tests.support.waiting import wait_until


@contextmanager
def shell_for(url: str, app: str, folder: Path) -> Iterator[Shell]:
    """A shell that knows a server, in a folder with an application."""
    runtime = Path(tempfile.mkdtemp(prefix="qs-"))
    shell = Shell(folder, runtime, {"QSERVE_REDIS_URL": url, "QSERVE_SECRET": SECRET})
    shell.write("app.py", app)
    yield shell
    shutil.rmtree(runtime)


class StartedInstance:
    """`qserve start` with a gateway, and its deployments."""

    def __init__(self, shell: Shell) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.shell = shell
        self.node = Running(shell, "start", "--gateway", "--port", str(port), "--replicas-per-node", "2")
        self.node.wait_for("serving on")
        deployed = shell.run("deploy", "app")
        assert deployed.returncode == 0, deployed.stderr

    def end(self) -> None:
        self.node.interrupt()
        assert self.node.end() == 0, self.node.output


@pytest.fixture(scope="module")
def served(shell: Shell) -> Iterator[StartedInstance]:
    instance = StartedInstance(shell)
    yield instance
    instance.end()


@pytest.fixture
def own_calls(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls of this process go to that instance."""
    for name, value in shell.extra.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("QSERVE_RUNTIME_DIR", str(shell.runtime))
    yield
    process_client.close_current_client()


def assert_control_works(shell: Shell) -> None:
    """Celery's control messages arrive, whose broker is the same Redis."""
    command = [sys.executable, "-m", "celery", "-A", "qserve_workers", "inspect", "ping", "--timeout", "1"]

    def answer() -> str:
        done = subprocess.run(
            command, env=shell.environment, capture_output=True, text=True, timeout=patience(40), check=False
        )
        return done.stdout

    wait_until(lambda: "pong" in answer())
