"""Deleting, and what dies and comes back."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

import qserve
from qserve import serve
from qserve.deployments.local_instance import find_record
from qserve.testing import TestInstance
from tests.support.chosen_server import needs_one_server
from tests.support.gates import Gate, Notes, is_alive
from tests.support.own_instance import node_of, part_of, record_of
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, joined, wait_until


@pytest.mark.usefixtures("qserve_instance")
def test_delete_waits_for_calls_sent_before_it_also_those_not_started(
    gate: Gate, notes: Notes, http: httpx.Client
) -> None:
    @serve.deployment(max_concurrent_queries=1)
    async def held(number: int = 0) -> int:
        notes.add(number)
        await gate.passed()
        return number

    held.deploy()
    refs = [held.get_handle().remote(number) for number in range(3)]
    notes.wait_for(1)

    deleting = threading.Thread(target=held.delete)
    deleting.start()
    wait_until(lambda: http.get("/-/routes").json() == {})

    assert http.get("/held").status_code == 404
    with pytest.raises(qserve.DeploymentNotFound):
        held.get_handle().remote().result(patience(LIMIT_S))
    assert deleting.is_alive()
    assert not any(ref.done() for ref in refs)
    gate.open()
    assert qserve.get(refs, timeout=patience(LIMIT_S)) == [0, 1, 2]
    joined(deleting)
    assert serve.list_deployments() == {}


@pytest.mark.usefixtures("qserve_instance")
def test_a_replica_stuck_in_a_call_is_killed_when_its_time_is_up_and_the_caller_is_told(notes: Notes) -> None:
    @serve.deployment(graceful_shutdown_timeout_s=0.1)
    def stuck() -> None:
        notes.add(os.getpid())
        time.sleep(1000)

    stuck.deploy()
    ref = stuck.get_handle().remote()
    [pid] = notes.wait_for(1)

    stuck.delete()

    wait_until(lambda: not is_alive(int(pid)))
    with pytest.raises(qserve.ReplicaDied):
        ref.result(patience(LIMIT_S))


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.usefixtures("qserve_instance")
def test_the_destructor_runs_once_and_calls_it_makes_get_out(is_async: bool, notes: Notes) -> None:
    @serve.deployment
    def listener(word: str) -> None:
        notes.add(word)

    @serve.deployment(name="Speaker")
    class SyncSpeaker:
        def __call__(self) -> None: ...

        def __del__(self) -> None:
            listener.get_handle().remote("goodbye").result(patience(20))

    @serve.deployment(name="Speaker")
    class AsyncSpeaker:
        def __call__(self) -> None: ...

        async def __del__(self) -> None:
            await listener.get_handle().remote("goodbye")

    listener.deploy()
    speaker: serve.Deployment[object] = AsyncSpeaker if is_async else SyncSpeaker
    speaker.deploy()
    assert notes.read() == []

    speaker.delete()

    assert notes.wait_for(1) == ["goodbye"]


def test_a_destructor_that_raises_is_logged_and_the_replica_goes(qserve_instance: TestInstance, notes: Notes) -> None:
    @serve.deployment
    class Complains:
        def __init__(self) -> None:
            notes.add(os.getpid())

        def __call__(self) -> None: ...

        def __del__(self) -> None:
            raise RuntimeError("I do not want to go")

    Complains.deploy()

    Complains.delete()

    wait_until(lambda: not is_alive(int(notes.read()[0])))
    record = find_record(qserve_instance.settings.namespace)
    assert record is not None
    log = Path(record.log_file)
    wait_until(lambda: "I do not want to go" in log.read_text())


@pytest.mark.usefixtures("qserve_instance")
def test_a_killed_replica_is_replaced_and_clients_that_try_again_reach_the_new_one(http: httpx.Client) -> None:
    @serve.deployment
    def pid() -> str:
        return str(os.getpid())

    pid.deploy()
    first = http.get("/pid").text

    os.kill(int(first), signal.SIGKILL)

    second = wait_until(lambda: (answer := http.get("/pid")).status_code == 200 and answer.text)
    assert second != first


@pytest.mark.usefixtures("qserve_instance")
def test_while_a_replacement_hangs_in_its_constructor_the_other_replica_serves_every_request(
    gate: Gate, notes: Notes, http: httpx.Client
) -> None:
    @serve.deployment(num_replicas=2)
    class Slow:
        def __init__(self) -> None:
            notes.add(os.getpid())
            if len(notes.read()) > 2:
                gate.pass_through()

        def __call__(self) -> str:
            return str(os.getpid())

    Slow.deploy()
    victim, other = notes.wait_for(2)

    os.kill(int(victim), signal.SIGKILL)
    notes.wait_for(3)

    assert [http.get("/Slow").text for _ in range(10)] == [other] * 10
    assert qserve.get([Slow.get_handle().remote() for _ in range(10)], timeout=patience(LIMIT_S)) == [other] * 10


def test_a_killed_gateway_comes_back_and_serves_what_was_deployed_meanwhile(
    qserve_instance: TestInstance, http: httpx.Client
) -> None:
    @serve.deployment(name="code", version="1")
    def first() -> str:
        return "1"

    @serve.deployment(name="code", version="2")
    def second() -> str:
        return "2"

    first.deploy()
    assert http.get("/code").text == "1"

    part_of(qserve_instance.settings.namespace, "qserve: gateway").kill()
    with httpx.Client(base_url=http.base_url, timeout=patience(LIMIT_S)) as another:
        assert another.get("/code").text == "1"  # which waits, because the port is open all the time
    second.deploy()

    assert wait_until(lambda: http.get("/code").text) == "2"


def is_serving(name: str, pid: str) -> bool:
    """Whether a replica takes calls."""
    return any((str(it.pid), it.state) == (pid, "SERVING") for it in serve.status()[name].replicas)


class TestAnInstance:
    """A node or a server that is killed is started again, and what was accepted is answered."""

    def test_whose_node_is_killed_answers_what_runs_and_what_comes(
        self, qserve_instance: TestInstance, gate: Gate, notes: Notes, http: httpx.Client
    ) -> None:
        @serve.deployment
        async def held() -> int:
            notes.add(os.getpid())
            await gate.passed()
            return os.getpid()

        held.deploy()
        namespace = qserve_instance.settings.namespace
        node, port = node_of(namespace), record_of(namespace).gateway_url
        with ThreadPoolExecutor() as pool:
            request = pool.submit(http.post, "/held")
            ref = held.get_handle().remote()
            durable = held.get_handle().options(durable=True).remote()
            [before, *_] = notes.wait_for(3)

            node.kill()

            wait_until(lambda: node_of(namespace).pid != node.pid)
            wait_until(lambda: not is_serving("held", before))  # until it is told to leave it takes what comes
            later = pool.submit(lambda: httpx.post(f"{port}/held", timeout=patience(LIMIT_S)))
            after = wait_until(lambda: next((pid for pid in notes.read() if pid != before), None))
            gate.open()

            assert (request.result().status_code, request.result().text) == (200, before)
            assert str(ref.result(patience(LIMIT_S))) == before
            assert str(later.result().json()) == after
            assert str(durable.result(patience(LIMIT_S))) in (before, after)
        assert record_of(namespace).gateway_url == port
        wait_until(lambda: not is_alive(int(before)))
        assert len(serve.status()["held"].replicas) == 1

    @needs_one_server  # which is the instance's own
    def test_whose_server_is_killed_has_its_deployments_again(
        self, qserve_instance: TestInstance, http: httpx.Client
    ) -> None:
        @serve.deployment
        def pid() -> str:
            return str(os.getpid())

        pid.deploy()
        before = http.get("/pid").text

        part_of(qserve_instance.settings.namespace, "valkey-server").kill()

        def answer() -> str | None:
            found = http.get("/pid")
            return found.text if found.status_code == 200 else None

        assert wait_until(answer) == before
        wait_until(lambda: list(serve.list_deployments()) == ["pid"])
        log = Path(record_of(qserve_instance.settings.namespace).log_file).read_text()
        assert "keeps nothing on disk" in log


def test_a_killed_worker_comes_back_with_its_replicas(qserve_instance: TestInstance, http: httpx.Client) -> None:
    @serve.deployment
    def pid() -> str:
        return str(os.getpid())

    pid.deploy()
    before = http.get("/pid").text

    os.kill(psutil.Process(int(before)).ppid(), signal.SIGKILL)

    def after_it() -> str | None:
        answer = http.get("/pid")
        return answer.text if answer.status_code == 200 and answer.text != before else None

    after = wait_until(after_it)
    wait_until(lambda: not is_alive(int(before)))
    assert is_alive(int(after))


@pytest.mark.usefixtures("qserve_instance")
def test_a_request_that_kills_every_replica_is_given_up(notes: Notes, http: httpx.Client) -> None:
    @serve.deployment
    def deadly() -> None:
        notes.add("called")
        os._exit(1)

    deadly.deploy()

    safe = http.get("/deadly")
    assert safe.status_code == 500
    assert "Task failed with 2 retries" in safe.text
    assert notes.read() == ["called"] * 3

    unsafe = http.post("/deadly")
    assert unsafe.status_code == 502
    assert notes.read() == ["called"] * 4


@pytest.mark.usefixtures("qserve_instance")
def test_a_safe_request_whose_replica_dies_is_run_again_on_another(notes: Notes, http: httpx.Client) -> None:
    @serve.deployment
    def dies_once() -> str:
        notes.add("called")
        if len(notes.read()) == 1:
            os._exit(1)
        return "alive"

    dies_once.deploy()

    assert http.get("/dies_once").text == "alive"
    assert notes.read() == ["called"] * 2


@pytest.mark.usefixtures("qserve_instance")
def test_deleting_twice_and_redeploying_with_new_code_work(http: httpx.Client) -> None:
    @serve.deployment(name="again", version="1")
    def first() -> str:
        return "first"

    @serve.deployment(name="again", version="1")
    def second() -> str:
        return "second"

    first.deploy()
    first.delete()
    first.delete()
    assert http.get("/again").status_code == 404

    second.deploy()

    assert http.get("/again").text == "second"


@pytest.mark.usefixtures("qserve_instance")
def test_a_deployment_that_comes_and_goes_again_and_again_never_waits_for_a_replica_that_does_not_leave() -> None:
    @serve.deployment(graceful_shutdown_timeout_s=60)  # whoever misses its order to leave is killed after that
    async def fleeting() -> int:
        return os.getpid()

    for replicas in (1, 2, 3, 1):
        fleeting.options(num_replicas=replicas).deploy()
        assert fleeting.get_handle().remote().result(patience(LIMIT_S)) > 0
        fleeting.delete()
    assert serve.list_deployments() == {}
