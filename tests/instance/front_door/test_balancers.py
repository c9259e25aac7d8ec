"""Gateways behind a load balancer are restarted one after another, and no request is lost."""

import http.client
import re
import shutil
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from qserve import serve
from qserve.testing import TestInstance
from tests.support.gateways import gateway
from tests.support.serving import ROOT, free_port
from tests.support.waiting import wait_until

CLIENTS = 6


@contextmanager
def balancer(name: str, folder: Path, front: int, gateways: list[int]) -> Iterator[None]:
    """Runs one with its shipped configuration, but for the ports."""
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    source = {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}[name]
    ports = dict(zip(("8000", "8001", "8002"), map(str, (front, *gateways)), strict=True))
    text = re.sub(r"\b800[012]\b", lambda found: ports[found[0]], (ROOT / "deploy/balancers" / source).read_text())
    if name == "nginx":
        own = "".join(f"{it}_temp_path {folder}/{it};" for it in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        text = f"daemon off; pid {folder}/pid; error_log {folder}/errors;\n" + text
        text = text.replace("http {", f"http {{ access_log off; {own}", 1)
    file = folder / source
    file.write_text(text)
    command = {"haproxy": ["haproxy", "-db", "-f"], "nginx": ["nginx", "-p", str(folder), "-c"]}[name]
    process = subprocess.Popen([*command, str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


class Load:
    """Clients that ask one request after another over connections that stay open, half of them POST."""

    def __init__(self, port: int) -> None:
        self.answers: Counter[object] = Counter()
        self._port = port
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        while not self._enough.is_set():
            try:
                connection.request("POST" if number % 2 else "GET", "/echo", b"x" * 100 if number % 2 else None)
                response = connection.getresponse()
                response.read()
                self.answers[response.status] += 1
            except (OSError, http.client.HTTPException) as error:
                self.answers[repr(error)] += 1
                connection.close()
        connection.close()

    def go_on(self) -> None:
        """Wait until a good many more requests are answered."""
        before = self.answers.total()
        wait_until(lambda: self.answers.total() > before + 200)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["haproxy", "nginx"])
def test_a_rolling_restart_of_the_gateways_loses_no_request(
    name: str, qserve_instance: TestInstance, tmp_path: Path
) -> None:
    @serve.deployment
    async def echo() -> str:
        return "here"

    echo.deploy()
    front, *ports = (free_port() for _ in range(3))
    settings = qserve_instance.settings

    def answers(port: int, path: str) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    with ExitStack() as stack:

        def start(port: int) -> Callable[[], None]:
            running = stack.enter_context(gateway(settings, "--port", str(port)))

            def restart() -> None:
                running.process.send_signal(signal.SIGTERM)
                running.process.wait()
                start(port)
                wait_until(lambda: answers(port, "/-/readyz"))

            return restart

        restarts = [start(port) for port in ports]
        stack.enter_context(balancer(name, tmp_path, front, ports))
        wait_until(lambda: answers(front, "/echo"))
        with Load(front) as load:
            for restart in restarts:
                load.go_on()
                restart()
                load.go_on()

    assert load.answers.keys() == {200}, load.answers
