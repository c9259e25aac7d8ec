"""Deploying: versions, configuration, rolling updates."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import qserve
from qserve import serve
from tests.support.gates import Gate, Notes
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, wait_until

pytestmark = pytest.mark.usefixtures("qserve_instance")


def pids_of(handle: Any, calls: int = 20) -> set[int]:
    """Pids that a deployment's calls return."""
    return set(qserve.get([handle.remote() for _ in range(calls)], timeout=patience(LIMIT_S)))


def serving(name: str, count: int) -> set[int]:
    """Pids of the replicas that take calls, once they are that many: each of them says so itself."""

    def found() -> set[int] | None:
        pids = {replica.pid for replica in serve.status()[name].replicas if replica.state == "SERVING"}
        return pids if len(pids) == count else None

    return wait_until(found)


def deploy_pid(**options: Any) -> serve.Deployment[Any]:
    """A deployment of that version which tells its pid."""

    @serve.deployment
    class Pid:
        def __call__(self) -> int:
            return os.getpid()

    deployment = Pid.options(**options)
    deployment.deploy()
    return deployment


def test_after_deploy_exactly_the_new_replicas_serve_and_each_is_a_process() -> None:
    handle = deploy_pid(version="1", num_replicas=2).get_handle()
    first = pids_of(handle)
    assert len(first) == 2
    assert os.getpid() not in first

    deploy_pid(version="2", num_replicas=2)

    second = pids_of(handle)
    assert len(second) == 2
    assert not first & second
    assert serving("Pid", 2) == second


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_scaling_together_with_a_new_version_ends_with_that_many_new_replicas(before: int, after: int) -> None:
    handle = deploy_pid(version="1", num_replicas=before).get_handle()
    old = serving("Pid", before)

    deploy_pid(version="2", num_replicas=after)

    new = serving("Pid", after)
    assert not new & old
    assert pids_of(handle) <= new


def test_scaling_the_same_version_starts_or_stops_only_the_difference() -> None:
    deploy_pid(version="1", num_replicas=2)
    two = serving("Pid", 2)

    deploy_pid(version="1", num_replicas=3)
    three = serving("Pid", 3)
    assert two < three

    deploy_pid(version="1", num_replicas=1)
    one = serving("Pid", 1)
    assert one < three


def test_load_is_spread_over_replicas_and_goes_to_the_one_that_is_left(http: httpx.Client) -> None:
    handle = deploy_pid(version="1", num_replicas=2).get_handle()
    over_http = Counter(http.get("/Pid").text for _ in range(20))
    over_handle = Counter(handle.remote().result(patience(LIMIT_S)) for _ in range(20))
    assert set(map(int, over_http)) == set(over_handle)
    assert min(over_http.values()) >= 5
    assert min(over_handle.values()) >= 5

    deploy_pid(version="1", num_replicas=1)

    assert len({http.get("/Pid").text for _ in range(10)}) == 1
    assert len(pids_of(handle)) == 1


@pytest.mark.parametrize("is_async", [True, False])
def test_reconfigure_runs_after_construction_and_when_the_config_changes(is_async: bool) -> None:
    @serve.deployment(name="Configured", version="1", user_config=1, num_replicas=2)
    class Sync:
        def __init__(self) -> None:
            self.seen: list[object] = []

        def reconfigure(self, config: object) -> None:
            self.seen.append(config)

        def __call__(self) -> object:
            return os.getpid(), self.seen

    class Async(Sync.func_or_class):  # type: ignore[misc,name-defined]
        async def reconfigure(self, config: object) -> None:
            self.seen.append(config)

    deployment: Any = Sync.options(Async) if is_async else Sync
    deployment.deploy()
    handle = deployment.get_handle()
    before = dict(qserve.get([handle.remote() for _ in range(10)], timeout=patience(LIMIT_S)))
    assert list(before.values()) == [[1], [1]]

    deployment.options(user_config={"two": 2}).deploy()

    after = dict(qserve.get([handle.remote() for _ in range(10)], timeout=patience(LIMIT_S)))
    assert after == {pid: [1, {"two": 2}] for pid in before}


def test_calls_taken_before_a_reconfigure_see_the_old_config_and_those_after_it_the_new(
    gate: Gate, notes: Notes
) -> None:
    @serve.deployment(version="1", user_config="old", num_replicas=3, max_concurrent_queries=10)
    class Config:
        async def reconfigure(self, config: object) -> None:
            self.config = config

        async def __call__(self) -> object:
            notes.add("running")
            await gate.passed()
            return self.config

    Config.deploy()
    handle = Config.get_handle()
    before = [handle.remote() for _ in range(30)]
    notes.wait_for(30)

    goal = Config.options(user_config="new").deploy(_blocking=False)
    assert not goal.wait(0.3)
    assert not any(ref.done() for ref in before)
    gate.open()

    assert goal.wait(patience(LIMIT_S))
    assert qserve.get(before, timeout=patience(LIMIT_S)) == ["old"] * 30
    assert qserve.get([handle.remote() for _ in range(10)], timeout=patience(LIMIT_S)) == ["new"] * 10


def test_of_two_replicas_one_goes_on_answering_while_the_other_reconfigures(gate: Gate, notes: Notes) -> None:
    @serve.deployment(version="1", user_config="old", num_replicas=2)
    class Config:
        async def reconfigure(self, config: object) -> None:
            if config == "new":
                notes.add("reconfiguring")
                await gate.passed()
            self.config = config

        async def __call__(self) -> object:
            return self.config

    Config.deploy()
    handle = Config.get_handle()

    goal = Config.options(user_config="new").deploy(_blocking=False)
    notes.wait_for(1)

    assert qserve.get([handle.remote() for _ in range(10)], timeout=patience(LIMIT_S)) == ["old"] * 10
    gate.open()
    assert goal.wait(patience(LIMIT_S))
    assert qserve.get([handle.remote() for _ in range(10)], timeout=patience(LIMIT_S)) == ["new"] * 10
    assert len(notes.read()) == 2


def test_a_reconfigure_that_raises_on_the_first_deploy_leaves_nothing() -> None:
    @serve.deployment(user_config="bad")
    class Refuses:
        def reconfigure(self, config: object) -> None:
            raise ValueError(f"no use for {config}")

    with pytest.raises(RuntimeError, match=r"Failed to reach deployment goal(?s:.)*no use for bad"):
        Refuses.deploy()

    assert "Refuses" not in serve.list_deployments()


def test_a_reconfigure_that_raises_later_brings_the_old_config_back() -> None:
    @serve.deployment(version="1", user_config="good", num_replicas=2)
    class Refuses:
        def reconfigure(self, config: object) -> None:
            if config == "bad":
                raise ValueError("no use for it")
            self.config = config

        def __call__(self) -> object:
            return self.config

    Refuses.deploy()

    with pytest.raises(RuntimeError, match="Failed to reach deployment goal"):
        Refuses.options(user_config="bad").deploy()

    handle = Refuses.get_handle()
    assert qserve.get([handle.remote() for _ in range(10)], timeout=patience(LIMIT_S)) == ["good"] * 10
    assert serve.get_deployment("Refuses").user_config == "good"


def test_a_user_config_needs_a_class_with_reconfigure() -> None:
    @serve.deployment(user_config=1)
    def function() -> None: ...

    @serve.deployment(user_config=1)
    class Without:
        def __call__(self) -> None: ...

    with pytest.raises(RuntimeError, match=r"Failed to reach deployment goal"):
        function.deploy()
    with pytest.raises(RuntimeError, match=r"missing reconfigure method"):
        Without.deploy()
    assert serve.list_deployments() == {}


def test_a_rolling_update_never_leaves_less_than_all_but_one_of_a_few_replicas(
    make_gate: Callable[[str], Gate], notes: Notes
) -> None:
    finish = make_gate("finish")

    def deployment(version: str) -> Any:
        @serve.deployment(name="Rolled", version=version, num_replicas=2)
        class Rolled:
            async def __call__(self, wait: bool = False) -> str:
                if wait:
                    notes.add(os.getpid())
                    await finish.passed()
                return version

        return Rolled

    deployment("1").deploy()
    handle = deployment("1").get_handle()
    held = [handle.remote(True) for _ in range(2)]
    assert len(set(notes.wait_for(2))) == 2  # one call holds each of the two

    goal = deployment("2").deploy(_blocking=False)
    wait_until(lambda: any(replica.state == "DRAINING" for replica in serve.status()["Rolled"].replicas))

    # One of them drains, so its successor may not serve yet; the other one answers as before.
    assert qserve.get([handle.remote() for _ in range(10)], timeout=patience(LIMIT_S)) == ["1"] * 10
    assert not goal.wait(0.3)
    finish.open()
    assert goal.wait(patience(LIMIT_S))
    assert qserve.get(held, timeout=patience(LIMIT_S)) == ["1", "1"]
    assert qserve.get([handle.remote() for _ in range(10)], timeout=patience(LIMIT_S)) == ["2"] * 10


def test_redeploying_one_replica_lets_calls_wait_for_the_new_version_and_finishes_the_old(
    make_gate: Callable[[str], Gate], notes: Notes, http: httpx.Client
) -> None:
    finish, construct = make_gate("finish"), make_gate("construct")

    def deployment(version: str) -> Any:
        @serve.deployment(name="Single", version=version)
        class Single:
            async def __init__(self) -> None:  # type: ignore[misc]
                if version == "2":
                    notes.add("constructing")
                    await construct.passed()

            async def hold(self) -> tuple[str, int]:
                notes.add("held")
                await finish.passed()
                return version, os.getpid()

            async def __call__(self) -> str:
                return version

        return Single

    deployment("1").deploy()
    handle = deployment("1").get_handle()
    held = handle.hold.remote()
    assert notes.wait_for(1) == ["held"]

    goal = deployment("2").deploy(_blocking=False)
    notes.wait_for(2)
    # The new version is constructed while the old one serves.
    assert handle.remote().result(patience(LIMIT_S)) == "1"
    assert http.get("/Single").text == "1"
    construct.open()
    wait_until(lambda: any(replica.state == "DRAINING" for replica in serve.status()["Single"].replicas))
    during = handle.remote()
    with pytest.raises(qserve.GetTimeoutError):
        during.result(0.3)
    assert not held.done()
    finish.open()

    assert goal.wait(patience(LIMIT_S))
    assert held.result(patience(LIMIT_S))[0] == "1"
    assert during.result(patience(LIMIT_S)) == "2"
    assert handle.hold.remote().result(patience(LIMIT_S))[1] != held.result()[1]


def test_without_surge_the_old_replica_goes_before_the_new_one_is_constructed(notes: Notes) -> None:
    def deployment(version: str) -> Any:
        @serve.deployment(name="Heavy", version=version, surge=False)
        class Heavy:
            def __init__(self) -> None:
                notes.add(f"up {version}")

            def __call__(self) -> str:
                return version

            def __del__(self) -> None:
                notes.add(f"down {version}")

        return Heavy

    deployment("1").deploy()
    deployment("2").deploy()

    assert notes.read() == ["up 1", "down 1", "up 2"]
    assert deployment("2").get_handle().remote().result(patience(LIMIT_S)) == "2"


def test_deploying_again_keeps_the_start_time() -> None:
    deployment = deploy_pid(version="1")
    started = deployed_at(deployment.name)

    deploy_pid(version="2")

    assert deployed_at(deployment.name) == started


def deployed_at(name: str) -> float:
    """When a deployment was deployed first."""
    from qserve.deployments.driver import ConnectedInstance
    from qserve.deployments.local_instance import find_settings

    instance = ConnectedInstance(find_settings())
    try:
        deployed = instance.state.get(name)
        assert deployed is not None
        return deployed.spec.deployed_at
    finally:
        instance.close()


def test_what_another_driver_process_deployed_is_found_and_called(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        "from qserve import serve\n"
        "@serve.deployment(version='1', init_args=('there',))\n"
        "class Elsewhere:\n"
        "    def __init__(self, what): self.what = what\n"
        "    def __call__(self): return self.what\n"
        "Elsewhere.deploy()\n"
    )
    subprocess.run([sys.executable, script], check=True, timeout=patience(LIMIT_S), cwd=tmp_path)

    found = serve.get_deployment("Elsewhere")

    assert found.get_handle().remote().result(patience(LIMIT_S)) == "there"
    found.options(version="2").deploy("here")
    assert found.get_handle().remote().result(patience(LIMIT_S)) == "here"


def test_a_taken_route_is_refused_before_anything_is_started(notes: Notes) -> None:
    deploy_pid(route_prefix="/taken")

    @serve.deployment(route_prefix="/taken")
    class Second:
        def __init__(self) -> None:
            notes.add("constructed")

        def __call__(self) -> None: ...

    with pytest.raises(ValueError, match="route_prefix '/taken' is already registered"):
        Second.deploy()

    assert list(serve.list_deployments()) == ["Pid"]
    assert notes.read() == []


def test_init_args_of_one_deploy_win_for_that_deploy_only() -> None:
    @serve.deployment(init_args=("decorator",), init_kwargs={"key": "too"})
    class Args:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.made_with = args, kwargs

        def __call__(self) -> object:
            return self.made_with

    handle = Args.get_handle()

    Args.deploy("call", other=1)
    assert handle.remote().result(patience(LIMIT_S)) == (("call",), {"other": 1})
    Args.deploy()
    assert handle.remote().result(patience(LIMIT_S)) == (("decorator",), {"key": "too"})
    Args.options(init_args=("options",)).deploy()
    assert handle.remote().result(patience(LIMIT_S)) == (("options",), {"key": "too"})


def test_closures_lambdas_and_other_pickled_things_are_init_args() -> None:
    class Local:
        value = 40

    @serve.deployment
    class Closure:
        def __init__(self, *functions: Callable[[], int], local: Local) -> None:
            self.sum = sum(function() for function in functions) + local.value

        def __call__(self) -> int:
            return self.sum

    number = 1
    Closure.deploy(lambda: number, lambda: 1, local=Local())

    assert Closure.get_handle().remote().result(patience(LIMIT_S)) == 42


def test_actor_options_of_ray_are_accepted_and_change_nothing() -> None:
    deployment = deploy_pid(ray_actor_options={"num_cpus": 0})

    assert deployment.get_handle().remote().result(patience(LIMIT_S)) > 0
    assert serve.get_deployment("Pid").ray_actor_options == {"num_cpus": 0}


def test_functions_and_classes_sync_and_async_with_and_without_parameters(http: httpx.Client) -> None:
    @serve.deployment
    def function() -> str:
        return "function"

    @serve.deployment
    async def async_function(request: object) -> str:
        return type(request).__name__

    @serve.deployment
    class Sync:
        def __init__(self) -> None:
            self.count = 0

        def __call__(self) -> str:
            self.count += 1
            return str(self.count)

    @serve.deployment
    class Async:
        async def __init__(self) -> bool:  # type: ignore[misc]
            self.count = 0
            return True  # noqa: PLE0101

        async def __call__(self) -> str:
            self.count += 1
            return str(self.count)

    serve.run([function, async_function, Sync, Async])

    assert http.get("/function").text == "function"
    assert http.get("/async_function").text == "Request"
    assert [http.get("/Sync").text for _ in range(2)] == ["1", "2"]
    assert [http.get("/Async").text for _ in range(2)] == ["1", "2"]
    assert function.get_handle().remote().result(patience(LIMIT_S)) == "function"
    assert Sync.get_handle().remote().result(patience(LIMIT_S)) == "3"
