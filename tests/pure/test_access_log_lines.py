"""What the access log writes to an output that takes less than there is."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from qserve_gateway.door import access_log
from qserve_gateway.door.access_log import AccessLog
from tests.support.waiting import until

SCOPE = {"client": ("1.1.1.1", 1), "method": "GET", "raw_path": b"/" + b"x" * 100, "http_version": "1.1"}


class Pipe:
    """One that takes 64 KiB and then refuses, as one does that is shared with a program which sets it so."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        os.set_blocking(self.writing, False)
        self.read = b""

    def lines(self) -> list[dict[str, Any]]:
        """All that have been written up to now, if the last one is whole."""
        with suppress(BlockingIOError):
            while part := os.read(self.reading, 65536):
                self.read += part
        return [json.loads(line) for line in self.read.splitlines()] if self.read.endswith(b"\n") else []


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    os.close(made.reading)
    os.close(made.writing)


async def test_no_line_is_lost_or_cut_where_the_output_does_not_block(pipe: Pipe) -> None:
    log = AccessLog("json", pipe.writing)
    for status in range(3000):
        log.add(SCOPE, status, 1, 0.1)
    await until(lambda: len(pipe.lines()) == 3000)
    log.add(SCOPE, 3000, 1, 0.1)
    await log.close()
    assert [line["status"] for line in pipe.lines()] == list(range(3001))


async def test_lines_that_are_dropped_are_counted(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "MOST_HELD", 10)
    log = AccessLog("json", pipe.writing)
    for status in range(13):
        log.add(SCOPE, status, 1, 0.1)
    await log.close()
    assert [line.get("status") for line in pipe.lines()] == [*range(10), None]
    assert pipe.lines()[-1] == {"dropped": 3}


async def test_an_output_that_nobody_reads_holds_up_no_end(pipe: Pipe) -> None:
    log = AccessLog("json", pipe.writing)
    for _ in range(3000):
        log.add(SCOPE, 200, 1, 0.1)
    await log.close()
    assert not pipe.read
    await until(lambda: len(pipe.lines()) == 3000)
