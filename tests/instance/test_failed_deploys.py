"""What is deployed after a version did not come up, and what `qserve rollback` goes back to then."""

import pytest

from qserve.broker.instance.state import State
from qserve.deployments import deploying
from qserve.wire.spec import DEPLOY_FAILED, HEALTHY, SERVING, DeploymentSpec
from tests.support.deployed import Broken, Pid
from tests.support.nodes import StartNode, spec, start_node
from tests.support.slowness import patience
from tests.support.waiting import wait_until

__all__ = ["start_node"]

pytestmark = pytest.mark.timeout(120)


def good(version: str) -> DeploymentSpec:
    return spec(Pid.options(version=version))


def bad(version: str) -> DeploymentSpec:
    return spec(Broken.options(name="Pid", version=version, max_constructor_retry_count=1))


def served(state: State) -> tuple[str | None, str]:
    """The version that is deployed, and how it fares."""
    deployed = state.get("Pid")
    assert deployed is not None
    return deployed.spec.version, deployed.state


def serving_pids(state: State) -> set[int]:
    return {info.pid for info in state.observed.replicas("Pid").values() if info.state == SERVING}


def test_the_former_version_is_what_it_was_before_the_deploy_that_failed(start_node: StartNode, state: State) -> None:
    start_node()
    deploying.deploy(state, good("1")).wait(patience(60))

    with pytest.raises(RuntimeError, match="no model to load"):
        deploying.deploy(state, bad("2")).wait(patience(60))
    assert state.former("Pid") is None

    deploying.deploy(state, good("3")).wait(patience(60))
    with pytest.raises(RuntimeError, match="no model to load"):
        deploying.deploy(state, bad("4")).wait(patience(60))

    former = state.former("Pid")
    assert former is not None
    assert (former.version, served(state)) == ("1", ("3", HEALTHY))


def test_a_deploy_that_fails_after_one_that_was_broken_off_leaves_what_serves(
    start_node: StartNode, state: State
) -> None:
    start_node()
    deploying.deploy(state, good("1")).wait(patience(60))
    before = serving_pids(state)
    deploying.deploy(state, bad("2"))  # whoever deployed it is gone, so nobody rolls it back
    wait_until(lambda: served(state) == ("2", DEPLOY_FAILED))

    with pytest.raises(RuntimeError, match="no model to load"):
        deploying.deploy(state, bad("3")).wait(patience(60))

    assert served(state) == ("1", HEALTHY)
    assert serving_pids(state) == before


def test_a_deploy_that_fails_does_not_stop_at_another_one_that_fails(start_node: StartNode, state: State) -> None:
    start_node()
    deploying.deploy(state, good("1")).wait(patience(60))
    before = serving_pids(state)
    deploying.deploy(state, bad("2"))

    with pytest.raises(RuntimeError, match="no model to load"):
        deploying.deploy(state, bad("3")).wait(patience(60))

    assert served(state) == ("1", HEALTHY)
    assert serving_pids(state) == before
