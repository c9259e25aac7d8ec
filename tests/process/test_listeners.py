"""A gateway starts whatever listeners it is given, and lets each leave in order."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from qserve.settings import Settings
from tests.support.processes import end_at_once
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, wait_until


@pytest.fixture
def process(sock: socket.socket, settings: Settings, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A gateway process with three listeners."""
    variables = {
        "QSERVE_REDIS_URL": settings.redis_url,
        "QSERVE_SECRET": settings.secret,
        "QSERVE_NAMESPACE": settings.namespace,
        "QSERVE_ADMIN_PORT": "0",
    }
    command = [sys.executable, "-m", "tests.support.third_listener", str(sock.fileno()), str(tmp_path / "ready")]
    process = subprocess.Popen(command, env=os.environ | variables, pass_fds=[sock.fileno()])
    yield process
    end_at_once(process)


def test_a_third_listener_is_started_with_the_others_and_finishes_what_it_has_begun(
    process: "subprocess.Popen[bytes]", sock: socket.socket, tmp_path: Path
) -> None:
    third = f"http://127.0.0.1:{sock.getsockname()[1]}"
    wait_until((tmp_path / "ready").exists)
    ready = json.loads((tmp_path / "ready").read_bytes())
    limit_s = patience(LIMIT_S)

    assert httpx.get(f"{ready['url']}/-/healthz", timeout=limit_s).status_code == 200
    assert httpx.get(f"{ready['admin_url']}/-/status", timeout=limit_s).status_code == 401
    assert httpx.get(f"{third}{tmp_path}/ready", timeout=limit_s).text == "third"

    with ThreadPoolExecutor() as pool:
        answer = pool.submit(httpx.get, f"{third}{tmp_path}/gate", timeout=limit_s)
        wait_until((tmp_path / "gate.asked").exists)
        with socket.create_connection(("127.0.0.1", ready["port"])) as idle:
            process.send_signal(signal.SIGTERM)
            idle.settimeout(limit_s)
            assert idle.recv(1) == b""  # the public listener has left
        assert not answer.done()
        (tmp_path / "gate").touch()
        assert answer.result().text == "third"
    assert process.wait(limit_s) == 0
