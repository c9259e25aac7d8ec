"""Fixtures: sentinels with their servers, and an instance that was told of nothing else."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qserve.calls import process_client
from tests.faults.failover.sentinels import Failover
from tests.support.servers import SECRET
from tests.support.serving import free_port
from tests.support.shell import Running, Shell
from tests.support.slowness import patience
from tests.support.waiting import wait_until

APP = """
    from qserve import serve

    @serve.deployment(version="1", idempotent=True)
    def echo(value):
        return value if isinstance(value, int) else value.query_params["value"]
"""


@pytest.fixture(scope="module")
def failover() -> Iterator[Failover]:
    folder = Path(tempfile.mkdtemp(prefix="qs-"))
    failover = Failover(folder)
    failover.start()
    yield failover
    failover.kill()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def shell(failover: Failover, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    runtime = Path(tempfile.mkdtemp(prefix="qs-"))
    shell = Shell(tmp_path_factory.mktemp("app"), runtime, {"QSERVE_REDIS_URL": failover.url, "QSERVE_SECRET": SECRET})
    shell.write("app.py", APP)
    yield shell
    shutil.rmtree(runtime)


class Instance:
    """`qserve start` with a gateway, and its deployment."""

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
def served(shell: Shell) -> Iterator[Instance]:
    instance = Instance(shell)
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
