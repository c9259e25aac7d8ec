"""A gateway that is started while Redis does not answer: it lives, says what is missing, and leaves when told to."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from qserve.settings import Settings
from tests.support.faulty_link import FaultyLink
from tests.support.processes import end_at_once
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, wait_until


@pytest.fixture
def line(settings: Settings) -> Iterator[FaultyLink]:
    """The way to Redis, on which nothing moves."""
    with FaultyLink(settings.redis_url) as line:
        line.part()
        yield line


@pytest.fixture
def process(line: FaultyLink, sock: socket.socket, settings: Settings) -> Iterator["subprocess.Popen[bytes]"]:
    variables = {
        "QSERVE_REDIS_URL": line.url,
        "QSERVE_SECRET": settings.secret,
        "QSERVE_NAMESPACE": settings.namespace,
    }
    command = [sys.executable, "-m", "qserve_gateway", "--fd", str(sock.fileno())]
    process = subprocess.Popen(command, env=os.environ | variables, pass_fds=[sock.fileno()])
    yield process
    end_at_once(process)


def ask(sock: socket.socket, path: str) -> httpx.Response | None:
    """The answer to a request; None if there is none."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{sock.getsockname()[1]}{path}", timeout=patience(5))
    return None


def answers(sock: socket.socket, path: str, status: int) -> bool:
    found = ask(sock, path)
    return found is not None and found.status_code == status


@pytest.mark.usefixtures("process")
def test_it_lives_and_refuses_requests_until_redis_answers(line: FaultyLink, sock: socket.socket) -> None:
    wait_until(lambda: answers(sock, "/-/healthz", 200))
    for path in ("/-/readyz", "/-/routes", "/hello"):
        answer = ask(sock, path)
        assert answer is not None
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")

    line.heal()

    wait_until(lambda: answers(sock, "/-/readyz", 200))
    assert answers(sock, "/-/routes", 200)
    assert answers(sock, "/hello", 404)


def test_it_leaves_in_order_when_it_is_told_to(process: "subprocess.Popen[bytes]", sock: socket.socket) -> None:
    """The first process of a container that has no handler for SIGTERM ignores it."""
    wait_until(lambda: answers(sock, "/-/healthz", 200))
    process.send_signal(signal.SIGTERM)
    assert process.wait(patience(LIMIT_S)) == 0
