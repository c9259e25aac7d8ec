"""Processes that are started ahead, with real ones."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qserve.deployments import head_start
from qserve.deployments.head_start import HeadStart
from qserve.this_machine import is_running
from tests.support.waiting import wait_until

PROGRAM = """
import json, os, sys
from qserve.deployments.head_start import wait_for_orders
if wait_for_orders(lambda: None):
    print(json.dumps([sys.argv[1:], os.environ.get("TOLD"), os.environ.get("GONE"), sys.stdin.read()]))
    print("an error", file=sys.stderr)
"""


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeadStart]:
    """A process that waits."""
    monkeypatch.setattr(head_start, "PROGRAM", (sys.executable, "-c", PROGRAM))
    monkeypatch.setenv("GONE", "1")
    started = HeadStart()
    yield started
    started.cancel()


def test_it_becomes_what_it_is_told_to_be(ahead: HeadStart, tmp_path: Path) -> None:
    told = tmp_path / "output"
    environment = {name: os.environ[name] for name in os.environ if name != "GONE"} | {"TOLD": "x" * 300_000 + "\udcff"}
    with told.open("wb") as file:
        process = ahead.begin(["--port", "8000"], environment, file.fileno())
    assert process is not None
    assert process.wait(60) == 0
    ahead.cancel()  # it has begun
    said, error = told.read_text().splitlines()
    assert said == '[["--port", "8000"], "' + "x" * 300_000 + '\\udcff", null, ""]'
    assert error == "an error"


def test_its_output_can_be_set_up_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is a pipe, while that of a process that waits is not."""
    program = f"""{PROGRAM}
    sys.stdout.reconfigure(encoding="utf-16-le", line_buffering=True)
    print("é", sys.stdout.name, sys.stderr.name, sys.stderr.errors, sys.stdout is sys.__stdout__)
"""
    monkeypatch.setattr(head_start, "PROGRAM", (sys.executable, "-c", program))
    started = HeadStart()
    reader, writer = os.pipe()
    process = started.begin([], {**os.environ, "TOLD": "", "GONE": ""}, writer)
    os.close(writer)
    assert process is not None
    with open(reader, "rb") as output:  # noqa: PTH123 (a descriptor)
        said = output.read()
    assert process.wait(60) == 0, said
    assert "é <stdout> <stderr> backslashreplace True\n".encode("utf-16-le") in said
    started.cancel()


def test_it_ends_when_nobody_wants_it(ahead: HeadStart) -> None:
    ahead.cancel()
    ahead.cancel()
    assert ahead._process.returncode is not None


def test_one_that_has_died_is_not_used(ahead: HeadStart) -> None:
    ahead._process.kill()
    ahead._process.wait()
    assert ahead.begin([], os.environ | {"A": "x" * 1_000_000}, 2) is None


def test_one_that_was_started_with_another_path_is_not_used(ahead: HeadStart) -> None:
    assert ahead.begin([], os.environ | {"PYTHONPATH": "elsewhere"}, 2) is None
    assert ahead._process.returncode is not None


def test_it_does_not_outlive_whoever_has_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_start, "PROGRAM", (sys.executable, "-c", PROGRAM))
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, b"%d" % HeadStart()._process.pid)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    left = int(os.read(reader, 16))
    os.close(reader)
    os.close(writer)
    wait_until(lambda: not is_running(left))
