"""A primary dies under load, its replica takes over, and it comes back as a replica; only sentinels tell where."""

import subprocess
import sys
import time
from typing import Any

import httpx
import pytest

from tests.faults.failover.load import Load
from tests.faults.failover.sentinels import PASSWORD, SENTINEL_PASSWORD, Failover
from tests.support.serving import free_port
from tests.support.shell import Shell
from tests.support.slowness import patience
from tests.support.started import StartedInstance, assert_control_works
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.usefixtures("own_calls"), pytest.mark.timeout(150)]

KINDS = {"handle", "http", "durable"}
HONEST = {"503", "502", "BrokerUnavailable", "Indeterminate", "CallNotFound"}
"""What a call may end as while the server is away, or has lost what it had acknowledged."""


def test_the_doctor_asks_every_sentinel(shell: Shell, failover: Failover) -> None:
    examined = shell.run("doctor")
    assert examined.returncode == 0, examined.stdout
    assert f"all 3 sentinels know the primary: 127.0.0.1:{failover.primary().port}" in examined.stdout


def test_calls_go_on_after_a_failover_and_each_ends_once(served: StartedInstance, failover: Failover) -> None:
    dead = failover.primary()
    with Load(served.url) as load:
        wait_until(lambda: load.answered_since(0) == KINDS)
        killed_at = time.monotonic()
        dead.kill()
        wait_until(lambda: failover.primary() is not dead)
        failed_over_at = time.monotonic()
        wait_until(lambda: load.answered_since(failed_over_at) == KINDS)
        back_at = time.monotonic()
        wait_until(lambda: len([call for call in load.ended if call.started > back_at]) > 200)
    errors = [call for call in load.ended if call.error]
    assert [call for call in errors if call.error not in HONEST] == []
    assert [call for call in errors if call.started > back_at or call.started + call.took_s < killed_at] == []
    assert back_at - failed_over_at < patience(10)
    assert_control_works(served.shell)


def test_the_old_primary_comes_back_and_nobody_writes_to_it(served: StartedInstance, failover: Failover) -> None:
    back = failover.other(failover.primary())
    back.start()  # as a primary, with what it remembers, until a sentinel tells it otherwise
    with Load(served.url) as load:
        run_by_hand(served.shell)
        wait_until(lambda: back.role() == "slave")
        became_replica_at = time.monotonic()
        wait_until(lambda: load.answered_since(became_replica_at) == KINDS)
        with back.client() as client:
            clients = client.client_list()
            visitors = {
                each["name"] for each in clients if each["flags"] == "N" and each["id"] != str(client.client_id())
            }
    assert {name for name in visitors if not name.startswith("sentinel-")} == set()
    assert [call for call in load.ended if call.error] == []


def test_no_password_is_ever_logged(served: StartedInstance) -> None:
    assert "connected to Redis again" in served.node.output
    for secret in (PASSWORD, SENTINEL_PASSWORD, "%2Fw%3A"):
        assert secret not in served.node.output


def run_by_hand(shell: Shell) -> None:
    """A gateway and a Celery worker that no node keeps."""
    port = free_port()
    hand = Shell(shell.folder, shell.runtime, shell.extra | {"QSERVE_NAMESPACE": "hand"})
    gateway = [sys.executable, "-m", "qserve_gateway", "--port", str(port)]
    worker = [sys.executable, "-m", "celery", "-A", "qserve_workers", "worker", "-Q", "echo"]
    quiet: Any = {"env": hand.environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen(command, cwd=hand.folder, **quiet) for command in (gateway, worker)]
    try:
        assert hand.run("deploy", "app").returncode == 0
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/echo?value=5", "5"))
    finally:
        for process in started:
            process.terminate()
        assert [process.wait(patience(30)) for process in started] == [0, 0]


def answers(url: str, text: str) -> bool:
    """Whether a GET is answered like this."""
    try:
        return httpx.get(url, timeout=patience(20)).text == text
    except httpx.HTTPError:
        return False
