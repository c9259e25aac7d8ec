"""How nodes and workers say that they make progress, and what `qserve healthy` makes of it."""

import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from qserve.cli.command_line import main
from qserve.deployments.alive_files import STUCK_AFTER_S, AliveFile, judge

_NO_PID = 2**22 + 1
"""Linux gives no process such a number."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QSERVE_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "qserve" / "alive"


def test_without_a_node_nothing_is_well() -> None:
    AliveFile("default", "worker of Echo").touch()
    AliveFile("other", "node").touch()
    well, ill = judge("default")
    assert well == [f"worker of Echo (pid {os.getpid()}) is well"]
    assert ill == ["no node of namespace 'default' runs here under this user"]


def test_who_stands_still_is_named(folder: Path) -> None:
    node, worker = AliveFile("default", "node"), AliveFile("default", "worker of Echo")
    node.touch()
    worker.touch()
    assert CliRunner().invoke(main, ["healthy"]).exit_code == 0
    long_ago = time.time() - STUCK_AFTER_S - 5
    (file,) = folder.glob("*~worker of Echo")
    os.utime(file, (long_ago, long_ago))
    done = CliRunner().invoke(main, ["healthy"])
    assert done.exit_code == 1
    assert f"worker of Echo (pid {os.getpid()}) has made no progress for 3" in done.output
    node.remove()
    assert len(judge("default")[1]) == 2


def test_a_process_that_was_killed_counts_no_more(folder: Path) -> None:
    AliveFile("default", "node").touch()
    (folder / f"default~{_NO_PID}~1~worker of Echo").touch()
    assert judge("default") == ([f"node (pid {os.getpid()}) is well"], [])
    assert len(list(folder.iterdir())) == 1


def test_a_process_that_was_killed_does_not_count_by_another_one_that_has_its_number_now(folder: Path) -> None:
    AliveFile("default", "worker of Echo").touch()
    (left,) = folder.iterdir()
    long_ago = time.time() - STUCK_AFTER_S - 5
    os.utime(left, (long_ago, long_ago))
    # As in a container that was killed and started again: the numbers are given anew, and the folder is the same.
    left.rename(left.with_name(left.name.replace(f"~{os.getpid()}~", f"~{os.getppid()}~")))
    AliveFile("default", "node").touch()
    assert judge("default") == ([f"node (pid {os.getpid()}) is well"], [])
    assert len(list(folder.iterdir())) == 1
