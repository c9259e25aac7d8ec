"""A replica is an ordinary process: what Celery sets up in its children does not show in user code."""

import asyncio
import os
import re
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from qserve import QServeError, TaskError, serve
from qserve.deployments.local_instance import find_record
from qserve.testing import TestInstance
from tests.support import ordinary_code, thread_bound_code
from tests.support.gates import is_alive
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, wait_until


@pytest.fixture
def processes(qserve_instance: TestInstance) -> Iterator[Any]:
    deployment = serve.deployment(name="processes")(ordinary_code.Processes)
    deployment.deploy()
    yield deployment.get_handle()
    deployment.delete()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_it_may_have_children(processes: Any, method: str) -> None:
    squares = [0, 1, 4, 9]
    assert processes.executor.remote(method).result(LIMIT_S) == squares
    assert processes.pool.remote(method).result(LIMIT_S) == squares
    assert processes.terminated.remote(method).result(LIMIT_S) == -signal.SIGTERM


@pytest.mark.parametrize(("how", "code"), [("exits", 7), ("raises", 1), ("returns", 0)])
def test_what_it_forks_ends_with_the_code_that_forked_it(processes: Any, how: str, code: int) -> None:
    assert processes.exit_code_of_a_fork.remote(how).result(LIMIT_S) == code


def test_managers_and_subprocesses_of_the_loop_work(processes: Any) -> None:
    assert processes.manager.remote().result(LIMIT_S) == [1, 2, 3]
    assert processes.subprocess_of_the_loop.remote().result(LIMIT_S) == "heard"
    assert processes.names.remote().result(LIMIT_S) == ("MainProcess", False)


def test_what_it_starts_has_pythons_signals(processes: Any) -> None:
    assert processes.signals_of_a_fork.remote().result(LIMIT_S) == [True, True, True, -1]
    assert processes.signals_of_a_program.remote().result(LIMIT_S) == "True set()"


def test_a_breakpoint_says_where_it_would_work(processes: Any) -> None:
    with pytest.raises(RuntimeError, match=r"no terminal in a replica.*qserve\.testing\.local"):
        processes.stop_here.remote().result(LIMIT_S)


def test_sys_exit_ends_its_call_only(processes: Any) -> None:
    before = processes.names.remote().result(LIMIT_S)
    with pytest.raises(QServeError, match="SystemExit"):
        processes.exits.remote().result(LIMIT_S)
    assert processes.names.remote().result(LIMIT_S) == before


def test_modules_constructors_and_def_methods_share_a_thread_and_async_code_is_told_of_it(
    qserve_instance: TestInstance,
) -> None:
    deployment = serve.deployment(name="thread_bound")(thread_bound_code.ThreadBound)
    deployment.deploy()
    handle: Any = deployment.get_handle()
    assert handle.query.remote().result(LIMIT_S) == [1, 1]
    assert handle.set_by.remote().result(LIMIT_S) == ["the module", "the constructor"]
    with pytest.raises(sqlite3.ProgrammingError, match="Open the connection where it is used"):
        handle.query_on_the_loop.remote().result(LIMIT_S)
    deployment.delete()


def test_a_module_may_use_the_event_loop_while_it_is_imported(qserve_instance: TestInstance) -> None:
    async def deploy() -> Any:
        from tests.support.module_with_tasks import UsesTasks  # here, too, it wants a loop

        return serve.deployment(name="uses_tasks")(UsesTasks)

    deployment = asyncio.run(deploy())
    deployment.deploy()
    assert deployment.get_handle().started.remote().result(LIMIT_S) == (True, True, "complete")
    deployment.delete()


def test_user_code_may_take_signals_for_itself_and_is_replaced_as_ever(qserve_instance: TestInstance) -> None:
    def deployment(version: str) -> Any:
        return serve.deployment(name="dumping", version=version)(ordinary_code.Dumping)

    deployment("1").deploy()
    handle: Any = deployment("1").get_handle()
    pid = handle.remote().result(LIMIT_S)
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        os.kill(pid, signum)
    assert handle.remote().result(LIMIT_S) == pid

    goal = deployment("2").deploy(_blocking=False)  # the new replica is told that it may serve
    assert goal.wait(patience(LIMIT_S))
    assert handle.remote().result(LIMIT_S) != pid
    deployment("2").delete()


@pytest.mark.parametrize("durable", [False, True])
def test_a_call_that_cancels_itself_has_failed(processes: Any, durable: bool) -> None:
    ref = processes.options(method_name="cancels_itself", durable=durable).remote()
    with pytest.raises(TaskError, match="CancelledError"):
        ref.result(LIMIT_S)


@pytest.mark.parametrize("how", ["killed", "deleted"])
def test_nothing_that_it_started_is_left_behind(qserve_instance: TestInstance, how: str) -> None:
    deployment = serve.deployment(name="leaves", graceful_shutdown_timeout_s=1)(ordinary_code.Processes)
    deployment.deploy()
    pids: list[int] = deployment.get_handle().leave_running.remote().result(LIMIT_S)
    assert all(map(is_alive, pids))
    if how == "killed":
        os.kill(pids[0], signal.SIGKILL)
    else:
        deployment.delete()
    wait_until(lambda: not any(map(is_alive, pids)))
    deployment.delete()


def test_a_killed_worker_leaves_nothing_behind(qserve_instance: TestInstance) -> None:
    deployment = serve.deployment(name="orphans")(ordinary_code.Processes)
    deployment.deploy()
    pids: list[int] = deployment.get_handle().leave_running.remote().result(LIMIT_S)
    worker = psutil.Process(pids[0]).parent()
    assert worker is not None
    worker.kill()
    wait_until(lambda: not any(map(is_alive, pids)))
    deployment.delete()


def test_a_celery_app_of_the_project_works_as_outside(qserve_instance: TestInstance) -> None:
    deployment = serve.deployment(name="celery_user")(ordinary_code.CeleryUser)
    deployment.deploy()
    handle: Any = deployment.get_handle()
    assert handle.own.remote().result(LIMIT_S) == 12
    assert handle.shared.remote().result(LIMIT_S) == "project"
    assert handle.shared_on_the_loop.remote().result(LIMIT_S) == "project"
    deployment.delete()


class TestTheEnd:
    def test_threads_finish_and_exit_hooks_run(self, qserve_instance: TestInstance, tmp_path: Path) -> None:
        deployment = serve.deployment(name="leaver")(ordinary_code.Leaver)
        deployment.deploy(str(tmp_path))
        pid: int = deployment.get_handle().remote().result(LIMIT_S)
        deployment.delete()
        wait_until(lambda: not is_alive(pid))
        assert (tmp_path / "atexit").read_text() == "ran"
        assert (tmp_path / "thread").read_text() == "finished"

    def test_a_hook_that_hangs_does_not_hold_it_up(self, qserve_instance: TestInstance, tmp_path: Path) -> None:
        deployment = serve.deployment(name="hanger", graceful_shutdown_timeout_s=1)(ordinary_code.Leaver)
        deployment.deploy(str(tmp_path), hangs=True)
        pid: int = deployment.get_handle().remote().result(LIMIT_S)
        deployment.delete()
        wait_until(lambda: not is_alive(pid))


class TestLogging:
    """The log of an instance has what user code writes, formatted as it says, and qserve's own records."""

    @pytest.fixture
    def log(self) -> Path:
        record = find_record("default")
        assert record is not None
        return Path(record.log_file)

    def lines(self, http: httpx.Client, log: Path, how: str) -> list[str]:
        """What a replica has written, with logging set up in that way."""
        mark = how.replace(" ", "_")
        deployment = serve.deployment(name=f"logs_{mark}")(ordinary_code.Logs)
        deployment.deploy(how)
        handle: Any = deployment.get_handle()
        handle.write.remote(mark).result(LIMIT_S)
        assert http.get(f"/logs_{mark}", params={"mark": mark}).status_code == 500
        awaited = (f"ValueError: fail-{mark}", f"print-{mark}", f"UserWarning: warn-{mark}", f"warning-{mark}")
        wait_until(lambda: all(each in log.read_text() for each in awaited), shows=log.read_text)
        assert "for-developers" not in log.read_text()  # what Python does not show unless it is asked to
        deployment.delete()
        lines = [line for line in log.read_text().splitlines() if line.endswith(f"-{mark}")]
        assert f"logs_{mark} | print-{mark}" in lines  # so that the terminal of a script can tell whose it is
        return [line.removeprefix(f"logs_{mark} | ") for line in lines]

    def test_basic_config_takes_effect(self, http: httpx.Client, log: Path) -> None:
        lines = self.lines(http, log, "basic")
        for line in ("MINE DEBUG debug-basic", "MINE INFO info-basic", "MINE WARNING warning-basic"):
            assert lines.count(line) == 1

    def test_without_a_level_it_is_pythons(self, http: httpx.Client, log: Path) -> None:
        lines = self.lines(http, log, "without a level")
        assert "MINE WARNING warning-without_a_level" in lines
        assert not any("info-" in line or "debug-" in line for line in lines)

    def test_dict_config_takes_effect(self, http: httpx.Client, log: Path) -> None:
        lines = self.lines(http, log, "dict")
        assert lines.count("MINE shop.orders2 info-dict") == 1
        assert not any("debug-" in line for line in lines)

    def test_unconfigured_records_look_like_all_others(self, http: httpx.Client, log: Path) -> None:
        lines = self.lines(http, log, "nothing")
        own = r"[-0-9]+ [:,0-9]+ {} +replica\[\d+\] \[logs_nothing#\w+ [-\w]+\] shop.orders: {}"
        (info,) = [line for line in lines if "info-" in line]
        assert re.fullmatch(own.format("INFO", "info-nothing"), info)
        assert any(re.fullmatch(own.format("WARNING", "warning-nothing"), line) for line in lines)
        assert not any("debug-" in line for line in lines)

    def test_functions_of_the_module_configure_nothing(self, http: httpx.Client, log: Path) -> None:
        lines = self.lines(http, log, "functions")
        own = r"[-0-9]+ [:,0-9]+ {} +replica\[\d+\] \[logs_functions#\w+ [-\w]+\] root: {}"
        for level, text in (("INFO", "info-functions"), ("WARNING", "warning-functions")):
            assert any(re.fullmatch(own.format(level, text), line) for line in lines)

    def test_the_default_configuration_is_pythons_own(self, http: httpx.Client, log: Path) -> None:
        lines = self.lines(http, log, "default")
        assert "WARNING:shop.orders:warning-default" in lines
        assert not any("info-" in line for line in lines)

    def test_formats_of_users_may_name_replica_and_call(self, http: httpx.Client, log: Path) -> None:
        lines = self.lines(http, log, "ids")
        assert [line for line in lines if re.fullmatch(r"logs_ids logs_ids#\w+ [-\w]+ info-ids", line)]
