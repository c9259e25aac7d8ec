"""Both sides of the differential tests: plain uvicorn, and the applications behind the gateway, a few at a time."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from qserve.testing import TestInstance
from tests.instance.differential.sides import Sides
from tests.support.serving import ROOT
from tests.support.slowness import patience
from tests.support.waiting import wait_until

Address = tuple[str, int]


@pytest.fixture(scope="session")
def plain_uvicorn() -> Iterator[Address]:
    """Where plain uvicorn serves all applications."""
    with tempfile.TemporaryDirectory() as folder:
        port_file = Path(folder) / "port"
        command = [sys.executable, "-m", "tests.instance.differential.plain", str(port_file)]
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            wait_until(lambda: port_file.exists() or process.poll() is not None)
            assert process.poll() is None, "plain uvicorn did not start"
            yield "127.0.0.1", int(port_file.read_text())
        finally:
            process.terminate()
            process.wait(patience(20))


@pytest.fixture(scope="module")
def sides(plain_uvicorn: Address, _session_instance: tuple[TestInstance, str]) -> Iterator[Sides]:
    """The two servers."""
    running, folder = _session_instance
    gateway = urlsplit(running.url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QSERVE_RUNTIME_DIR", folder)
        yield Sides(plain_uvicorn, (str(gateway.hostname), int(gateway.port or 0)))
        running.clear()
