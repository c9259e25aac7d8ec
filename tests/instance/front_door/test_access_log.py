"""Request ids from the client to the replica's log, and the access log."""

import json
import re
from functools import partial
from pathlib import Path

import httpx
import pytest

from qserve.testing import TestInstance
from tests.instance.front_door.cases import calls_of, get
from tests.support.gates import Gate
from tests.support.gateways import gateway
from tests.support.raw_http import Address, read_response
from tests.support.slowness import patience
from tests.support.waiting import wait_until


def test_the_id_in_a_500_is_in_the_replicas_log(impatient: TestInstance, log_of_instance: Path) -> None:
    for headers in ({}, {"X-Request-Id": "mine-42"}):
        answer = httpx.get(f"{impatient.url}/fail", headers=headers)
        request_id = answer.headers["x-request-id"]
        assert answer.status_code == 500
        assert request_id in answer.text
        wait_until(partial(is_in, log_of_instance, f"request {request_id}\n"), 5)


def is_in(file: Path, text: str) -> bool:
    return text in file.read_text()


@pytest.mark.parametrize("style", ["json", "text"])
def test_each_response_has_a_line(impatient: TestInstance, style: str) -> None:
    with gateway(impatient.settings, QSERVE_ACCESS_LOG=style) as logged:
        with logged.address.connect() as connection:
            for request in (
                get(b"X-Request-Id: mine", target=b'/a"b?q=1'),
                get(target=b"/-/healthz"),
                get(target=b"/fail"),
            ):
                connection.sendall(request)
                read_response(connection)
            connection.sendall(get(host=b""))
            refused = read_response(connection)[1][b"x-request-id"].decode()
        logged.address.ask(get(b"Connection: close"))
        lines = logged.output().decode().splitlines()
    assert len(lines) == 5
    if style == "json":
        told = [json.loads(line) for line in lines]
        assert [line["status"] for line in told] == [200, 200, 500, 400, 200]
        assert [line["deployment"] for line in told] == ["tell", "", "fail", "", "tell"]
        assert (told[0]["path"], told[0]["request_id"], told[0]["method"]) == ("/a%22b?q=1", "mine", "GET")
        assert told[3]["request_id"] == refused
        assert told[0]["client"] == "127.0.0.1"
        assert told[0]["bytes"] > 100
        assert 0 < told[0]["ms"] < patience(5000)
    else:
        first = r'[-\d]+T[\d:.]+Z 127\.0\.0\.1:\d+ "GET /a%22b\?q=1 HTTP/1\.1" 200 \d+ [\d.]+ms tell mine'
        assert re.fullmatch(first, lines[0])


def test_there_is_no_access_log_unless_asked_for(impatient: TestInstance) -> None:
    with gateway(impatient.settings) as silent:
        silent.address.ask(get(b"Connection: close"))
        assert silent.output() == b""


def test_a_client_that_leaves_has_a_line_too(impatient: TestInstance, gate: Gate, tmp_path: Path) -> None:
    with gateway(impatient.settings, QSERVE_ACCESS_LOG="json") as logged:
        with logged.address.connect() as connection:
            connection.sendall(get(target=b"/slow?gate=%b" % bytes(tmp_path / "gate")))
            wait_until(lambda: calls_of(impatient, "slow") == 1)
        wait_until(lambda: calls_of(impatient, "slow") == 0)  # it was safe to cancel
        assert [json.loads(line)["status"] for line in logged.output().splitlines()] == [499]


def test_nobody_who_does_not_read_the_log_holds_up_the_gateway_or_its_end(impatient: TestInstance) -> None:
    """The pipe is full after 64 KiB."""
    with gateway(impatient.settings, QSERVE_ACCESS_LOG="json") as logged:
        address: Address = logged.address
        with address.connect() as connection:
            for _ in range(1_000):
                connection.sendall(get(target=b"/-/healthz?" + b"a" * 200))
                assert read_response(connection)[0] == 200
        logged.process.terminate()
        assert logged.process.wait(patience(20)) == 0


@pytest.fixture
def log_of_instance(impatient: TestInstance) -> Path:
    """Where the instance's processes log."""
    record_folder = Path(impatient.settings.redis_url.removeprefix("unix://").partition("?")[0]).parent
    return next((record_folder.parent / "logs").iterdir())
