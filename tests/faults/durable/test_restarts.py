"""What durable calls survive: the end of every process, their server's too, and the gateway they came through."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.powered import deploy, machine
from tests.support.servers import SECRET, Server
from tests.support.shell import Shell
from tests.support.slowness import patience
from tests.support.waiting import wait_until

APP = """
    import os, time
    from pathlib import Path
    from qserve import serve

    HERE = Path(__file__).parent

    @serve.deployment(version="1", max_concurrent_queries=4, max_threads=4)
    def work(name):
        name = name if isinstance(name, str) else name.query_params["name"]
        with (HERE / "runs").open("a") as runs:
            runs.write(f"{name}\\n")
        serve.get_replica_context().report_progress(name)
        while not (HERE / "gate").exists():
            time.sleep(0.01)
        return f"{name} is done"
"""


@pytest.fixture
def server() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="qs-"))
    server = Server(folder)
    yield server
    server.kill()
    shutil.rmtree(folder)


@pytest.fixture
def shell(server: Server, tmp_path: Path) -> Iterator[Shell]:
    runtime = Path(tempfile.mkdtemp(prefix="qs-"))
    shell = Shell(tmp_path, runtime, {"QSERVE_REDIS_URL": server.url, "QSERVE_SECRET": SECRET})
    shell.write("app.py", APP)
    yield shell
    shutil.rmtree(runtime)


def python(shell: Shell, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"from qserve import serve\nfrom qserve.calls.handle import get_handle\n{code}"],
        check=False,
        cwd=shell.folder,
        env=shell.environment,
        capture_output=True,
        text=True,
        timeout=patience(40),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_for_runs(shell: Shell, count: int) -> list[str]:
    """The calls that were started, once there are that many."""
    return wait_until(
        lambda: started if len(started := _runs(shell)) >= count else None, 40, shows=lambda: _runs(shell)
    )


def _runs(shell: Shell) -> list[str]:
    runs = shell.folder / "runs"
    return runs.read_text().split() if runs.exists() else []


@pytest.mark.timeout(180)
def test_calls_survive_the_end_of_everything(server: Server, shell: Shell) -> None:
    with machine(shell) as first:
        deploy(shell, first)
        first.wait()
        over_http = first.http.get("/work?name=http", headers={"Prefer": "respond-async"}).headers["location"]
        submit = "print(get_handle('work').options(durable=True%s).remote('%s').id)"
        running = python(shell, submit % ("", "running"))
        delayed = python(shell, submit % (", delay=1", "delayed"))
        wait_for_runs(shell, 2)
    server.kill()

    server.start()
    with machine(shell) as second:
        second.wait()
        wait_for_runs(shell, 3)  # what may have killed a replica runs again alone
        (shell.folder / "gate").touch()

        assert second.http.get(over_http, params={"wait": 30}).json()["response"]["body"] == "http is done"
        for call_id, name in ((running, "running"), (delayed, "delayed")):
            assert python(shell, f"print(serve.get_ref('{call_id}').result(30))") == f"{name} is done"
        assert second.http.get(over_http).json()["attempts"] == 2
        runs = wait_for_runs(shell, 5)
        assert runs.count("http") == runs.count("running") == 2
        assert runs.count("delayed") in (1, 2)  # on a slow machine it has begun before the end of everything


@pytest.mark.timeout(180)
def test_a_call_can_be_followed_at_another_gateway(shell: Shell) -> None:
    with machine(shell) as second:
        with machine(shell) as first:
            deploy(shell, first)
            first.wait()
            headers = {"Prefer": "respond-async", "Idempotency-Key": "k"}
            location = first.http.post("/work?name=one", headers=headers).headers["location"]
            wait_for_runs(shell, 1)
            with first.http.stream("GET", f"{location}/events") as events:
                lines = events.iter_lines()
                assert next(line for line in lines if line.startswith("event")) == "event: queued"
        second.wait()
        (shell.folder / "gate").touch()

        with second.http.stream("GET", f"{location}/events", headers={"Last-Event-ID": "1"}) as events:
            seen = [line for line in events.iter_lines() if line.startswith("event")]
        again = second.http.post("/work?name=one", headers={"Idempotency-Key": "k"})

    assert seen[0] == "event: started"
    assert seen[-1] == "event: done"
    assert "event: progress" in seen
    assert again.text == "one is done"
    assert again.headers["idempotent-replayed"] == "true"
    assert len(wait_for_runs(shell, 1)) <= 2
