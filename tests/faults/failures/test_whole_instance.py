"""A node with its worker and gateway, as `qserve start --gateway` runs them, when their server forgets everything."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.powered import deploy, machine
from tests.support.servers import SECRET, Server
from tests.support.shell import Shell
from tests.support.waiting import wait_until

APP = """
    import os
    from qserve import serve

    @serve.deployment(version="1")
    def work():
        return str(os.getpid())
"""


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[tuple[Shell, Server]]:
    folder, runtime = (Path(tempfile.mkdtemp(prefix="qs-")) for _ in range(2))
    server = Server(folder, keeps_data=False)
    shell = Shell(tmp_path, runtime, {"QSERVE_REDIS_URL": server.url, "QSERVE_SECRET": SECRET})
    shell.write("app.py", APP)
    yield shell, server
    server.kill()
    shutil.rmtree(folder)
    shutil.rmtree(runtime)


@pytest.mark.timeout(150)
def test_the_same_processes_serve_on_after_the_server_forgot_them(shell: tuple[Shell, Server]) -> None:
    user, server = shell
    with machine(user) as node:
        deploy(user, node)
        node.wait()
        replica = node.http.get("/work").text
        processes = {each.pid for each in psutil.Process(node.node.process.pid).children(recursive=True)}

        server.kill()
        server.start()
        answers = [ask(node.http) for _ in range(5)]

        assert answers == [replica] * 5
        assert processes <= {each.pid for each in psutil.Process(node.node.process.pid).children(recursive=True)}
        assert "work" in user.run("status").stdout
        deploy(user, node)  # changes nothing
        assert ask(node.http) == replica


def ask(http: httpx.Client) -> str:
    """The answer, as soon as there is one: no 404 is given meanwhile."""

    def answer() -> str | None:
        with contextlib.suppress(httpx.TransportError):
            response = http.get("/work")
            if response.status_code == 200:
                return response.text
            assert response.status_code == 503, response.text
        return None

    return wait_until(answer, 60)
