"""An instance with a folder for data, after everything of it was killed, its server included."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.serving import runtime_folder
from tests.support.shell import Shell, background, descendants
from tests.support.slowness import patience
from tests.support.waiting import wait_until

APP = """
    import time
    from pathlib import Path
    from qserve import serve

    HERE = Path(__file__).parent

    @serve.deployment
    def work(name):
        with (HERE / "runs").open("a") as runs:
            runs.write(f"{name}\\n")
        while not (HERE / "gate").exists():
            time.sleep(0.01)
"""
CALLS = """
from qserve import serve

handle = serve.get_deployment("work").get_handle().options(durable=True)
for number in range(20):
    print(handle.remote(str(number)).id)
"""


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with runtime_folder() as runtime:
        shell = Shell(tmp_path, runtime)
        shell.write("app.py", APP)
        yield shell


def test_durable_calls_run_after_everything_was_killed(shell: Shell) -> None:
    command = ("run", "app", "--port", "0", "--data", "data")
    runs, data = shell.folder / "runs", shell.folder / "data"
    data.mkdir(mode=0o755)
    with background(shell, *command) as first:
        first.wait_for("Ctrl-C stops it")
        accepted = subprocess.run(
            [sys.executable, "-c", CALLS], env=shell.environment, cwd=shell.folder, check=True, stdout=subprocess.PIPE
        )
        assert len(accepted.stdout.split()) == 20
        wait_until(runs.exists)
        kept = [data / "instance.json", *(data / "appendonlydir").iterdir()]
        assert [path.name for path in kept if path.stat().st_mode & 0o77] == []  # others may not read arguments

        everything = [*descendants(first.process.pid), psutil.Process(first.process.pid)]
        for process in everything:
            process.kill()
        psutil.wait_procs(everything[:-1], patience(10))
    (shell.folder / "gate").touch()

    with background(shell, *command) as second:
        second.wait_for("Ctrl-C stops it")
        wait_until(lambda: set(runs.read_text().split()) == {str(number) for number in range(20)})
        other = Shell(shell.folder, Path(tempfile.gettempdir()), {"QSERVE_NAMESPACE": "another"})
        assert "is in use by another instance" in other.error(*command)


def test_data_that_cannot_be_read_is_named_and_left_alone(shell: Shell) -> None:
    manifest = shell.folder / "data" / "appendonlydir" / "appendonly.aof.manifest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("damaged")

    done = shell.run("run", "app", "--port", "0", "--data", "data")

    assert done.returncode == 1
    assert "Valkey did not start (exit code 1)" in done.stderr
    assert f"Its data is in {shell.folder / 'data'}, and was not changed." in done.stderr
    assert "or name another folder with --data" in done.stderr
    assert manifest.read_text() == "damaged"
