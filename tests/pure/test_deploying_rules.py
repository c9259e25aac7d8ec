"""What is written when something is deployed over something, and when a deploy is done; no processes."""

import pytest
from msgspec.structs import replace

from qserve.broker.instance.state import State
from qserve.deployments import deploying
from qserve.deployments.deploying import Goal, deploy, next_spec, weigh
from qserve.errors import BrokerUnavailable
from qserve.wire.spec import (
    DEPLOY_FAILED,
    DEPLOYING,
    HEALTHY,
    WAITING,
    Deployed,
    DeploymentSpec,
    NodeInfo,
    Target,
    WorkerInfo,
)


def spec(version: str | None = None, code: str = "m:Old", **options: object) -> DeploymentSpec:
    made = DeploymentSpec(name="Echo", target=Target(code), revision="given", version=version)
    return replace(made, **options)


def current(version: str | None, state: str = HEALTHY) -> Deployed:
    return Deployed(spec(version, revision="running", init_args=b"old", deployed_at=1.0), 4, state)


class TestVersions:
    def test_the_same_version_keeps_code_and_init_args_and_takes_the_configuration(self) -> None:
        written = next_spec(spec("1", "m:New", init_args=b"new", num_replicas=3, route_prefix="/n"), current("1"))

        assert (written.target.import_path, written.init_args, written.revision) == ("m:Old", b"old", "running")
        assert (written.num_replicas, written.route_prefix) == (3, "/n")

    def test_a_new_version_is_a_new_revision(self) -> None:
        written = next_spec(spec("2", "m:New", init_args=b"new"), current("1"))

        assert written.revision not in {"running", "given"}
        assert (written.target.import_path, written.init_args) == ("m:New", b"new")

    def test_without_a_version_every_deploy_is_a_new_revision(self) -> None:
        first, second = next_spec(spec(), current(None)), next_spec(spec(), current(None))

        assert len({first.revision, second.revision, "running"}) == 3

    def test_a_version_that_failed_is_tried_anew(self) -> None:
        assert next_spec(spec("1", "m:New"), current("1", DEPLOY_FAILED)).target.import_path == "m:New"

    def test_the_start_time_is_that_of_the_first_deploy(self) -> None:
        assert next_spec(spec("2"), current("1")).deployed_at == 1.0

    def test_nothing_is_written_when_nothing_changes(self, state: State) -> None:
        first = deploy(state, spec("1"))
        again = deploy(state, spec("1", "m:New"))

        assert again.deployed.generation == first.deployed.generation == 1


class TestPrevVersion:
    @pytest.mark.parametrize("deployed", [None, current(None), current("2")], ids=["nothing", "unversioned", "other"])
    def test_must_be_deployed(self, deployed: Deployed | None) -> None:
        with pytest.raises(ValueError, match="prev_version '1'"):
            next_spec(spec("3", prev_version="1"), deployed)

    def test_lets_a_match_pass(self) -> None:
        assert next_spec(spec("2", prev_version="1"), current("1")).version == "2"


def node(name: str, only: tuple[str, ...] = ()) -> NodeInfo:
    return NodeInfo(id=name, host="h", pid=1, only=only)


def worker(name: str, generation: int, state: str = HEALTHY, error: str = "") -> WorkerInfo:
    return WorkerInfo(
        id=f"w-{name}", node=name, host="h", pid=2, generation=generation, state=state, wanted=1, ready=1, error=error
    )


class TestWaiting:
    def test_done_when_every_serving_node_has_the_generation(self) -> None:
        nodes = {"a": node("a"), "b": node("b"), "c": node("c", only=("Other",))}

        half = weigh("Echo", 5, nodes, {"a": worker("a", 5), "b": worker("b", 4)})
        whole = weigh("Echo", 5, nodes, {"a": worker("a", 5), "b": worker("b", 6)})

        assert not half.done
        assert whole.done

    def test_a_worker_started_by_hand_is_waited_for_too(self) -> None:
        assert not weigh("Echo", 5, {}, {"hand": worker("hand", 4)}).done

    def test_still_deploying_is_not_done(self) -> None:
        assert not weigh("Echo", 5, {"a": node("a")}, {"a": worker("a", 5, DEPLOYING)}).done

    def test_an_old_failure_is_not_ours(self) -> None:
        progress = weigh("Echo", 5, {"a": node("a")}, {"a": worker("a", 4, DEPLOY_FAILED, "boom")})

        assert progress.error is None
        assert not progress.done

    def test_a_failure_ends_the_wait(self) -> None:
        progress = weigh("Echo", 5, {"a": node("a")}, {"a": worker("a", 5, DEPLOY_FAILED, "boom")})

        assert progress.done
        assert progress.error == "boom"

    def test_a_deploy_waits_for_a_server_that_is_away_for_a_moment(
        self, state: State, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        goal, read, losses = deploy(state, spec()), state.get, [BrokerUnavailable("Redis cannot be reached")] * 3

        def get(name: str) -> Deployed | None:
            if losses:
                raise losses.pop()
            return read(name)

        monkeypatch.setattr(state, "get", get)

        assert goal.wait()
        assert losses == []

    def test_a_deploy_that_waits_no_longer_for_the_server_says_what_becomes_of_it(
        self, state: State, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        goal = deploy(state, spec())

        def lost(_name: str) -> None:
            raise BrokerUnavailable("Redis cannot be reached")

        monkeypatch.setattr(state, "get", lost)
        monkeypatch.setattr(deploying, "_REDIS_BACK_WITHIN_S", 0.0)

        with pytest.raises(BrokerUnavailable, match=r"'Echo' is rolled out all the same.*: `qserve status` shows how"):
            goal.wait()

    def test_without_a_node_deploy_returns_at_once_and_the_deployment_waits(self, state: State) -> None:
        goal: Goal = deploy(state, spec())

        assert goal.wait()

        deployed = state.get("Echo")
        assert deployed is not None
        assert deployed.state == WAITING
