"""`qserve logs`: the log file of an instance on this machine, found, narrowed down, followed, and safe to look at."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec
import pytest
from click.testing import CliRunner, Result

from qserve.cli.command_line import main
from qserve.deployments import log_files
from qserve.deployments.local_instance import InstanceRecord, record_path
from qserve.deployments.log_files import log_tail, new_log_file, rotate_if_long
from qserve.this_machine import runtime_folder

STAMP = "2026-03-01 12:04:00,000 INFO    node[4701] x:"
TEXT = """2026-03-01 12:03:04,567 INFO    node[4701] qserve.node: worker of 'Counter': pid 4705.
2026-03-01 12:03:09,318 WARNING replica[4711] [Counter#1a2b 8f3e-17] shop.orders: stock is low
Traceback (most recent call last):
  File "shop.py", line 3, in __call__
ValueError: low
2026-03-01 12:03:10,318 WARNING replica[4712] [Counters#1a2c 8f3e-170] shop.orders: another call
{"time": "2026-03-01T12:03:11.000Z", "deployment": "Counter", "call_id": "8f3e-17", "message": "as JSON"}
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log file of an instance that has ended."""
    monkeypatch.setenv("QSERVE_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("QSERVE_NAMESPACE", "mine")
    path = new_log_file(runtime_folder(), "mine")
    path.write_text(TEXT)
    return path


def logs(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["logs", *arguments])


def running(log_file: str) -> None:
    """This process is the instance of the namespace."""
    record = InstanceRecord(namespace="mine", redis_url="", secret="", pid=os.getpid(), folder="", log_file=log_file)
    record_path("mine").write_bytes(msgspec.json.encode(record))


def test_the_log_of_an_instance_that_has_ended_is_shown_and_named(log: Path) -> None:
    shown = logs()
    assert shown.stdout == TEXT
    assert f"this is the log of the last one, {log}" in shown.stderr


def test_the_log_of_another_instance_than_the_one_that_is_meant_is_not_shown(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QSERVE_REDIS_URL", "redis://elsewhere")
    shown = logs()
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert f"For the log of the last one here, {log}, unset QSERVE_REDIS_URL." in shown.stderr
    running(str(log))
    assert f"For the instance that runs here (pid {os.getpid()}) unset" in logs().stderr
    monkeypatch.setenv("QSERVE_REDIS_URL", "")
    assert logs().stdout == TEXT


def test_what_is_about_a_deployment_or_a_call_is_shown_with_its_traceback(log: Path) -> None:
    running(str(log))
    assert "stock is low" in logs("Counter").stdout
    assert "Counters#" not in logs("Counter").stdout
    found = logs("--call", "8f3e-17").stdout
    assert "ValueError: low\n" in found
    assert "another call" not in found
    assert "pid 4705" not in found
    assert logs("--call", "8f3e-17", "Counters").stdout == ""


def test_only_the_last_records(log: Path) -> None:
    running(str(log))
    assert logs("-n", "2").stdout.splitlines() == TEXT.splitlines()[-2:]
    assert logs("-n", "0").stdout == ""


def test_every_record_is_a_line_of_json(log: Path) -> None:
    running(str(log))
    records = [json.loads(line) for line in logs("--json").stdout.splitlines()]
    assert len(records) == 4
    assert records[1]["record"].endswith("ValueError: low")
    assert records[3]["message"] == "as JSON"


def test_what_is_printed_among_records_of_json_is_json_too(log: Path) -> None:
    running(str(log))
    message = {"time": "2026-03-01T12:03:11.000Z", "message": "del \x7f csi \x9b2J next \x85 ü"}
    printed = ["what user code prints", "{'a': 1}", "{", "}", "[" * 100_000, '{"a": ' * 100_000]
    log.write_text("\n".join([json.dumps(message, ensure_ascii=False), *printed]) + "\n")
    shown = logs("--json").stdout
    assert not set(shown) & {"\x7f", "\x9b", "\x85"}
    first, *others = map(json.loads, shown.split("\n")[:-1])
    assert first == message
    assert "\n".join(each["record"] for each in others) == "\n".join(printed)


def test_what_is_logged_cannot_command_the_terminal(log: Path) -> None:
    running(str(log))
    log.write_text(f"{STAMP} \x1b]0;title\x07 \x1b[2J \x9b2J \x1b[31mred\x1b[0m \tend\r\x08\n")
    shown = logs().stdout
    assert shown == f"{STAMP} \\x1b]0;title\\x07 \\x1b[2J \\x9b2J red \tend\\r\\x08\n"  # a pipe gets no colors


def test_of_a_huge_log_only_the_end_is_read(log: Path) -> None:
    running(str(log))
    with log.open("wb") as file:
        file.truncate(20 << 30)
        file.seek(0, os.SEEK_END)
        file.write(f"\n{STAMP} one\n{STAMP} two\nof two\n{STAMP} three \xff\n".encode("latin-1"))
    assert logs("-n", "2").stdout == f"{STAMP} two\nof two\n{STAMP} three \N{REPLACEMENT CHARACTER}\n"
    assert log_tail(log).endswith("three \N{REPLACEMENT CHARACTER}")


def test_lines_of_any_length_are_records(log: Path) -> None:
    running(str(log))
    long = f"{STAMP} [8f3e-17] {'x' * 3_000_000}\n"
    log.write_text(f"{TEXT}{long}{TEXT}")
    assert logs("-n", "5").stdout == long + TEXT
    assert logs("--call", "8f3e-17").stdout.count("x" * 3_000_000) == 1
    assert logs().stdout == f"{TEXT}{long}{TEXT}"


def test_a_log_that_becomes_long_begins_anew_and_what_was_before_is_found(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running(str(log))
    monkeypatch.setattr(log_files, "LARGEST_BYTES", len(TEXT))
    rotate_if_long(log)
    assert log.read_text() == TEXT
    with log.open("a") as writer:
        writer.write(f"{STAMP} newer\n")
        writer.flush()
        rotate_if_long(log)
        writer.write(f"{STAMP} newest [8f3e-17]\n")
    assert log.read_text() == f"{STAMP} newest [8f3e-17]\n"
    found = logs("--call", "8f3e-17").stdout
    assert "ValueError: low\n" in found
    assert found.endswith("newest [8f3e-17]\n")
    assert logs("-n", "2").stdout == f"{STAMP} newer\n{STAMP} newest [8f3e-17]\n"
    os.utime(log, (1, 1))  # files of one moment have no order
    for _ in range(5):  # the old one goes, with what was before it
        new_log_file(runtime_folder(), "mine")
    assert not list(log.parent.glob(f"{log.name}*"))


@contextlib.contextmanager
def following(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "qserve.cli", "logs", "-f", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_what_comes_is_shown_when_its_line_is_whole(log: Path) -> None:
    running(str(log))
    enough = threading.Event()

    def write() -> None:
        with log.open("a") as file:
            while not enough.wait(0.01):
                for part in (f"{STAMP} [new-1]", " asked", " for\n", f"{STAMP} [new-2] something else\n"):
                    file.write(part)
                    file.flush()
                    enough.wait(0.01)

    writer = threading.Thread(target=write)
    with following("-n", "0", "--call", "new-1") as process:
        try:
            assert process.stdout is not None
            writer.start()
            seen = [process.stdout.readline() for _ in range(3)]
            assert all(line.endswith(" asked for\n") for line in seen), seen
        finally:
            enough.set()
            writer.join()


def test_a_log_is_followed_while_it_is_rotated(log: Path) -> None:
    """Cut short as by `copytruncate`, and replaced by another file while its processes go on writing to the old one."""
    running(str(log))
    with following("-n", "1") as process, log.open("a") as writer:
        assert process.stdout is not None
        assert process.stdout.readline().endswith('"as JSON"}\n')

        def shows(text: str, file: IO[str]) -> None:
            file.write(f"{STAMP} {text}\n")
            file.flush()
            assert process.stdout is not None
            assert process.stdout.readline() == f"{STAMP} {text}\n"

        shows("first", writer)
        os.truncate(log, 0)
        shows("cut", writer)
        log.rename(f"{log}.1")
        shows("to the old one, because there is no other", writer)
        log.touch()
        shows("to the old one, although there is another", writer)
        with log.open("a") as other:
            shows("to the new one", other)


def test_whoever_follows_is_told_that_the_instance_has_ended(log: Path) -> None:
    shown = logs("-f", "-n", "1")
    assert shown.stdout.splitlines() == TEXT.splitlines()[-1:]
    assert "The instance has ended." in shown.stderr


def test_a_reader_that_has_enough_may_leave(log: Path) -> None:
    running(str(log))
    log.write_text(TEXT * 1000)
    command = f"{sys.executable} -m qserve.cli logs | head -n 1"
    shown = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert shown.stdout == TEXT.splitlines(keepends=True)[0]
    assert shown.stderr == ""


def test_an_instance_without_a_log_file_says_where_it_logs(log: Path) -> None:
    running("")
    refused = logs()
    assert refused.exit_code == 1
    assert "log to the terminal or service that started them" in " ".join(refused.output.split())
