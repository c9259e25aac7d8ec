"""`qserve run` as a user starts it: in a folder, with a runtime folder and port of its own, ended by Ctrl-C."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.slowness import patience
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]


_LOWEST_PORT = 10_000
_FIRST_OF_THE_SYSTEM = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
"""From here on are the ports that the system gives to those who ask for any, such as all clients."""


def free_port() -> int:
    """A port that nothing listens on now, and that no client is given before it is used."""
    return free_ports(1)


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nothing listens on now."""
    while True:
        first = random.randrange(_LOWEST_PORT, max(_FIRST_OF_THE_SYSTEM, _LOWEST_PORT + 1000) - count)
        with ExitStack() as probes:
            try:
                for port in range(first, first + count):
                    probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first


@contextmanager
def runtime_folder() -> Iterator[Path]:
    """A private runtime folder, short enough for the path of a socket in it."""
    folder = Path(tempfile.mkdtemp(prefix="qs-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def environment(runtime: Path) -> dict[str, str]:
    """The environment of a user whose only instance is the one under test."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("QSERVE_")}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return {**kept, "PATH": path, "QSERVE_RUNTIME_DIR": str(runtime), "PYTHONUNBUFFERED": "1"}


@dataclass
class Serving:
    """A running `qserve run`."""

    url: str
    runtime: Path
    process: subprocess.Popen[str]
    output: Path


@contextmanager
def serving(command: list[str], port: int, runtime: Path, folder: Path, ready: str = "/-/healthz") -> Iterator[Serving]:
    """Runs the command until `ready` answers; at the end Ctrl-C has to end it with exit code 0."""
    output = runtime / f"output-{port}"
    with output.open("w") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(runtime), stdout=out, stderr=subprocess.STDOUT, text=True
        )
    instance = Serving(f"http://127.0.0.1:{port}", runtime, process, output)
    try:
        wait_for_answer(instance, ready)
        yield instance
    finally:
        process.send_signal(signal.SIGINT)
        try:
            code = process.wait(patience(40))
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{command} did not end within 40 s of Ctrl-C:\n{output.read_text()}") from None
    assert code in (0, 130, -signal.SIGINT), output.read_text()


def wait_for_answer(instance: Serving, path: str) -> None:
    """Wait until the path answers with a status below 500, and the routes with one at least."""

    def answers() -> bool:
        assert instance.process.poll() is None, instance.output.read_text()
        try:
            with urllib.request.urlopen(instance.url + path, timeout=patience(5)) as response:
                return path != "/-/routes" or response.read() != b"{}"
        except urllib.error.HTTPError as error:
            return error.code < 500 and error.code != 404
        except OSError:
            return False

    wait_until(answers, 50, shows=instance.output.read_text)
