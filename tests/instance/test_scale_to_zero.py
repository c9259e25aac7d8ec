"""A deployment that nobody calls has no process, and the call that wakes it is answered as any other."""

import os
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import qserve
from qserve import serve
from qserve.deployments.driver import THIS_PROCESS
from qserve.testing import TestInstance
from tests.support.gates import Notes
from tests.support.own_instance import node_of, part_of
from tests.support.processes import command_line
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, wait_until

pytestmark = pytest.mark.usefixtures("qserve_instance")


def sleepy(notes: Notes, delay_s: float = 0.2) -> Any:
    """A deployment that sleeps after so long without a call."""

    @serve.deployment(
        autoscaling_config={"min_replicas": 0, "max_replicas": 2, "downscale_to_zero_delay_s": delay_s},
        idempotent=True,
    )
    def drowsy(number: int = 0) -> str:
        notes.add(number)
        return f"{os.getpid()}"

    return drowsy


@pytest.fixture
def drowsy(qserve_instance: TestInstance, notes: Notes) -> Any:
    """One that is deployed."""
    deployment = sleepy(notes)
    deployment.deploy()
    return deployment


def is_asleep() -> bool:
    deployed = THIS_PROCESS.current().state.get("drowsy")
    return deployed is not None and deployed.asleep and not serve.status()["drowsy"].replicas


def processes(instance: TestInstance) -> Iterator[str]:
    for process in node_of(instance.settings.namespace).children(recursive=True):
        yield command_line(process)


def test_it_costs_no_process_and_a_request_wakes_it(
    drowsy: Any, qserve_instance: TestInstance, http: httpx.Client
) -> None:
    wait_until(is_asleep)
    wait_until(lambda: not any("drowsy" in title for title in processes(qserve_instance)))
    assert serve.status()["drowsy"].state == "HEALTHY"

    answer = wait_until(lambda: (found := http.get("/drowsy")).headers.get("server-timing") and found)

    assert answer.status_code == 200
    assert re.fullmatch(r'wake;desc="no replica, one was started";dur=\d+', answer.headers["server-timing"])
    assert "server-timing" not in http.get("/drowsy").headers
    wait_until(is_asleep)


def test_durable_calls_wake_it_when_they_are_due(drowsy: Any) -> None:
    handle = drowsy.get_handle()
    for options in ({}, {"priority": "batch"}, {"delay": 1.5}):
        wait_until(is_asleep)
        assert handle.options(durable=True, **options).remote().result(patience(LIMIT_S))


def test_a_deploy_while_it_sleeps_starts_the_new_version(notes: Notes) -> None:
    deployment = sleepy(notes)
    deployment.options(version="1").deploy()
    wait_until(is_asleep)

    deployment.options(version="1").deploy()  # nothing changes, and nothing is waited for
    deployment.options(version="2").deploy()

    assert serve.list_deployments()["drowsy"].version == "2"
    wait_until(is_asleep)
    assert deployment.get_handle().remote().result(patience(LIMIT_S))


def test_a_constructor_that_raises_is_told_when_it_is_deployed() -> None:
    @serve.deployment(autoscaling_config={"min_replicas": 0, "max_replicas": 2})
    class Broken:
        def __init__(self) -> None:
            raise ValueError("no weights")

    with pytest.raises(RuntimeError, match="no weights"):
        Broken.deploy()


def test_no_call_is_lost_that_comes_while_the_last_replica_leaves(notes: Notes) -> None:
    deployment = sleepy(notes, delay_s=0.05)
    deployment.deploy()
    handle = deployment.get_handle()
    refs: list[Any] = []
    chance, until = random.Random(5), time.monotonic() + 6
    while time.monotonic() < until:
        refs.append(handle.remote(len(refs)))
        time.sleep(chance.uniform(0, 0.6))  # long enough for it to sleep, or just not

    pids = qserve.get(refs, timeout=patience(LIMIT_S))

    assert len(set(pids)) > 1  # it has slept in between
    assert sorted(map(int, notes.read())) == list(range(len(refs)))


@pytest.mark.parametrize("victim", ["qserve: node", "qserve: worker of drowsy"])
def test_who_is_killed_while_it_wakes_keeps_no_call_from_its_answer(
    victim: str, drowsy: Any, qserve_instance: TestInstance, notes: Notes
) -> None:
    wait_until(is_asleep)
    handle = drowsy.get_handle()
    with ThreadPoolExecutor() as pool:
        waking = pool.submit(lambda: handle.remote(1).result(patience(LIMIT_S)))
        if "worker" in victim:
            wait_until(lambda: any(victim in title for title in processes(qserve_instance)))
        part_of(qserve_instance.settings.namespace, victim).kill()

        assert waking.result()
    assert handle.remote(2).result(patience(LIMIT_S))
    assert set(notes.read()) == {"1", "2"}
