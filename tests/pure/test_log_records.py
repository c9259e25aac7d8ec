"""The log: one format for all processes, with the ids of replica and call, as text or as JSON."""

import io
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qserve.context import CallInfo, current_call
from qserve.deployments.log_files import KEPT, log_tail, new_log_file, newest_log_file
from qserve.errors import ConfigurationError
from qserve.settings import Settings
from qserve.telemetry import log_records


@pytest.fixture
def logger(request: pytest.FixtureRequest) -> Iterator[logging.Logger]:
    """A logger of its own in a process that says it is a replica."""
    factory = logging.getLogRecordFactory()
    log_records.log_as("replica", "Counter", "Counter#1a2b3c4d")
    made = logging.Logger("shop.orders")
    yield made
    logging.setLogRecordFactory(factory)
    log_records.log_as("command")


def written(logger: logging.Logger, log_format: str, **extra: Any) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(log_records.formatter(log_format))
    logger.handlers = [handler]
    try:
        raise ValueError("too few")
    except ValueError:
        logger.warning("stock is %s", "low", extra=extra, exc_info=extra.pop("with_error", None))
    return stream.getvalue().rstrip("\n")


@pytest.fixture
def call() -> Iterator[CallInfo]:
    info = CallInfo("r-1", attempt=2, lineage="0-1 8f3e-17")
    token = current_call.set(info)
    yield info
    current_call.reset(token)


@pytest.mark.usefixtures("call")
def test_a_line_of_text_says_where_it_comes_from(logger: logging.Logger) -> None:
    line = written(logger, "text")
    assert " WARNING replica[" in line
    assert line.endswith("] [Counter#1a2b3c4d r-1 8f3e-17 attempt 2] shop.orders: stock is low")


def test_outside_of_calls_there_is_no_id(logger: logging.Logger) -> None:
    assert written(logger, "text").endswith("] [Counter#1a2b3c4d] shop.orders: stock is low")
    assert "call_id" not in json.loads(written(logger, "json"))


@pytest.mark.usefixtures("call")
def test_a_line_of_json_has_the_ids_what_users_add_and_the_traceback(logger: logging.Logger) -> None:
    line = json.loads(written(logger, "json", item=object, count=3, with_error=True))
    assert line.pop("time").endswith("Z")
    assert line.pop("pid") > 0
    assert "ValueError: too few" in line.pop("exception")
    assert line == {
        "level": "WARNING",
        "process": "replica",
        "logger": "shop.orders",
        "message": "stock is low",
        "deployment": "Counter",
        "replica": "Counter#1a2b3c4d",
        "request_id": "r-1",
        "call_id": "8f3e-17",
        "attempt": 2,
        "item": str(object),
        "count": 3,
    }


def test_what_a_user_adds_under_our_names_is_no_error(logger: logging.Logger) -> None:
    line = json.loads(written(logger, "json", request_id="mine", deployment="theirs"))
    assert (line["deployment"], line["replica"]) == ("Counter", "Counter#1a2b3c4d")


def test_log_files_are_kept_but_not_all(tmp_path: Path) -> None:
    made = []
    for age in range(KEPT + 2, 0, -1):
        made.append(new_log_file(tmp_path, "default"))
        os.utime(made[-1], (time.time() - age,) * 2)  # clocks of files are too coarse to tell them apart
    other = new_log_file(tmp_path, "default2")
    made[-1].write_text("x" * 10_000 + "the end\n")
    assert [path.exists() for path in made] == [False] * 2 + [True] * KEPT
    assert other.exists()
    assert len({*made, other}) == KEPT + 3
    assert log_tail(made[-1]).endswith("the end")
    assert newest_log_file(tmp_path, "default") == made[-1]
    assert newest_log_file(tmp_path, "none") is None


def test_a_setting_that_cannot_be_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSERVE_LOG_FORMAT", "xml")
    with pytest.raises(ConfigurationError, match=r"^QSERVE_LOG_FORMAT: Input should be 'text' or 'json'\. docs/"):
        Settings()
    monkeypatch.setenv("QSERVE_LOG_FORMAT", "")
    assert Settings().log_format == "text"


def test_whatever_users_add_the_line_is_json_and_nothing_is_lost(logger: logging.Logger) -> None:
    class Rude:
        def __str__(self) -> str:
            raise RuntimeError

    def strict(text: str) -> Any:
        assert "\n" not in text
        return json.loads(text, parse_constant=pytest.fail)

    endless: dict[str, Any] = {}
    endless["more"] = endless
    found = strict(written(logger, "json", array=np.arange(3), zero=0, no=False, rude=Rude(), keys={(1, 2): 3, "a": 4}))
    assert found["array"] == "[0 1 2]"
    assert (found["zero"], found["no"], found["rude"], found["keys"]) == (0, False, "<Rude>", {"a": 4})
    found = strict(written(logger, "json", endless=endless, nan=math.nan, count=3, text="caf\udce9"))
    assert found["endless"] == "{'more': {...}}"
    assert (found["nan"], found["count"], found["text"]) == ("nan", 3, "caf\udce9")

    record = logging.LogRecord("shop", logging.ERROR, "x.py", 1, "%d of %d", ("one",), None)
    assert strict(log_records.formatter("json").format(record))["message"] == "%d of %d ('one',)"
    record = logging.LogRecord("shop", logging.ERROR, "x.py", 1, Rude(), None, None)
    vars(record)[3] = "a key that is no text"  # type: ignore[index]
    found = strict(log_records.formatter("json").format(record))
    assert (found["message"], found["3"]) == ("<Rude>", "a key that is no text")
