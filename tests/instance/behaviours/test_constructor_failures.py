"""Constructors that fail, hang or take long."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qserve
from qserve import serve
from qserve.deployments import deploying
from qserve.deployments.local_instance import find_record
from qserve.testing import TestInstance
from tests.support.gates import Gate, Notes, is_alive
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, wait_until


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.usefixtures("qserve_instance")
def test_a_constructor_that_always_raises_is_given_up_after_three_attempts_per_replica(
    replicas: int, notes: Notes
) -> None:
    @serve.deployment(num_replicas=replicas)
    class Fails:
        def __init__(self) -> None:
            notes.add(os.getpid())
            raise RuntimeError("no model here")

        def __call__(self) -> None: ...

    with pytest.raises(RuntimeError) as caught:
        Fails.deploy()

    assert str(caught.value).startswith("Failed to reach deployment goal. Check the serve logs for details.")
    assert "no model here" in str(caught.value)
    assert len(notes.read()) >= 3 * replicas
    assert "Fails" not in serve.list_deployments()
    wait_until(lambda: not any(is_alive(int(pid)) for pid in notes.read()))


def _exit() -> None:
    sys.exit("MODEL_PATH is not set")


def _panic() -> None:
    raise BaseException("weights are not readable")


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _segfault() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (_exit, "MODEL_PATH is not set"),
        (_panic, "weights are not readable"),
        (lambda: os._exit(3), "exit code 3"),
        (lambda: os._exit(0), "exit code 0"),
        (os.abort, "killed by SIGABRT"),
        (_segfault, "killed by SIGSEGV"),
        (_terminate, "SIGTERM"),
    ],
    ids=["sys.exit", "BaseException", "os._exit", "os._exit(0)", "os.abort", "segfault", "SIGTERM"],
)
@pytest.mark.usefixtures("qserve_instance")
def test_a_constructor_that_ends_its_process_is_given_up_with_the_reason(
    end: Callable[[], None], reason: str, notes: Notes
) -> None:
    @serve.deployment
    class Ends:
        def __init__(self) -> None:
            notes.add(os.getpid())
            end()

        def __call__(self) -> None: ...

    with pytest.raises(RuntimeError, match=reason):
        Ends.deploy()

    assert len(notes.read()) >= 3
    assert "Ends" not in serve.list_deployments()


@pytest.mark.usefixtures("qserve_instance")
def test_once_a_replica_is_up_the_others_are_tried_again_under_new_tags(notes: Notes) -> None:
    @serve.deployment(num_replicas=2)
    class OneIsUnlucky:
        def __init__(self) -> bool:  # type: ignore[misc]
            tag = serve.get_replica_context().replica_tag
            notes.add(tag)
            if tag == notes.read()[0]:
                raise RuntimeError("the first one has no luck")
            return True  # noqa: PLE0101

        def __call__(self) -> str:
            return serve.get_replica_context().replica_tag

    OneIsUnlucky.deploy()

    tags = notes.read()
    assert len(set(tags)) == len(tags) == 3
    found = set(qserve.get([OneIsUnlucky.get_handle().remote() for _ in range(20)], timeout=patience(LIMIT_S)))
    assert found == set(tags[1:])
    assert all(tag.startswith("OneIsUnlucky#") for tag in tags)


@pytest.mark.usefixtures("qserve_instance")
def test_a_failure_that_passes_does_not_fail_the_deploy(notes: Notes) -> None:
    @serve.deployment
    class Transient:
        def __init__(self) -> None:
            notes.add("attempt")
            if len(notes.read()) < 2:
                raise RuntimeError("not yet")

        def __call__(self) -> str:
            return "here"

    Transient.deploy()

    assert Transient.get_handle().remote().result(patience(LIMIT_S)) == "here"
    assert notes.read() == ["attempt"] * 2


@pytest.mark.usefixtures("qserve_instance")
def test_replicas_are_constructed_side_by_side(notes: Notes) -> None:
    @serve.deployment(num_replicas=2)
    class WaitsForTheOther:
        def __init__(self) -> None:
            notes.add("here")
            notes.wait_for(2)

        def __call__(self) -> str:
            return "both"

    WaitsForTheOther.deploy()

    assert WaitsForTheOther.get_handle().remote().result(patience(LIMIT_S)) == "both"


def test_the_traceback_is_in_the_log_under_the_deployments_name(qserve_instance: TestInstance) -> None:
    @serve.deployment
    class Logged:
        def __init__(self) -> None:
            raise RuntimeError("look for me")

        def __call__(self) -> None: ...

    with pytest.raises(RuntimeError):
        Logged.deploy()

    record = find_record(qserve_instance.settings.namespace)
    assert record is not None
    log = Path(record.log_file).read_text()
    assert "Exception in deployment 'Logged'" in log
    assert "RuntimeError: look for me" in log


@pytest.mark.usefixtures("qserve_instance")
def test_a_slow_start_is_warned_of_with_name_and_count(
    gate: Gate, notes: Notes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @serve.deployment(num_replicas=2)
    class SlowToStart:
        def __init__(self) -> None:
            notes.add("starting")
            gate.pass_through()

        def __call__(self) -> None: ...

    monkeypatch.setattr(deploying, "_SLOW_START_S", 0.1)
    with caplog.at_level(logging.WARNING):
        goal = SlowToStart.deploy(_blocking=False)
        notes.wait_for(2)
        assert not goal.wait(0.5)
    gate.open()
    assert goal.wait(patience(LIMIT_S))

    assert "'SlowToStart' has 2 of 2 replicas" in caplog.text


@pytest.mark.usefixtures("qserve_instance")
def test_a_constructor_that_hangs_fails_the_deploy(make_gate: Callable[[str], Gate]) -> None:
    @serve.deployment(initialization_timeout_s=0.5)
    class Hangs:
        def __init__(self) -> None:
            never.pass_through()

        def __call__(self) -> None: ...

    never = make_gate("never")
    with pytest.raises(RuntimeError, match="Failed to reach deployment goal"):
        Hangs.deploy()
    assert "Hangs" not in serve.list_deployments()
