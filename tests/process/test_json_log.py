"""The log as JSON: one object a line, whatever a process has to say."""

import json
import subprocess
import sys

NOISE = """
import logging, sys, threading, warnings
from qserve.telemetry.log_records import log_to_stderr

log_to_stderr("node", "INFO", "json")
warnings.warn("old")


def fail():
    raise ValueError("no\\ngood")


class Bad:
    __del__ = fail = lambda self: fail()


thread = threading.Thread(target=fail, name="mine")
thread.start()
thread.join()
Bad()
quiet = threading.Thread(target=sys.exit)
quiet.start()
quiet.join()
fail()
"""


def test_as_json_warnings_and_uncaught_errors_are_records_too() -> None:
    ended = subprocess.run([sys.executable, "-c", NOISE], capture_output=True, text=True, check=False)
    records = [json.loads(line) for line in ended.stderr.splitlines()]
    assert [(each["logger"], each["level"]) for each in records] == [
        ("py.warnings", "WARNING"),
        ("python", "ERROR"),
        ("python", "ERROR"),
        ("python", "CRITICAL"),
    ]
    assert records[1]["message"] == "thread mine ended with ValueError"
    assert all("ValueError: no\ngood" in each["exception"] for each in records[1:])
    assert ended.returncode == 1
