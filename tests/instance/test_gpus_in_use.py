"""Deployments that want a GPU, in an instance with one."""

import os
from typing import Any

from qserve import serve
from qserve.testing import TestInstance
from tests.support.waiting import wait_until

ONE = {"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": "7"}}, "num_gpus": 1}


class Gpu:
    def __init__(self, says: str = "") -> None:
        self.says = says

    def __call__(self) -> str:
        return f"{os.environ['CUDA_VISIBLE_DEVICES']} {self.says}"


def replicas(name: str) -> list[Any]:
    found = serve.status().get(name)
    return [] if found is None else list(found.replicas)


def test_a_gpu_goes_from_one_version_to_the_next_and_from_one_deployment_to_another(
    qserve_instance: TestInstance,
) -> None:
    first = serve.deployment(name="first", route_prefix=None, ray_actor_options=ONE)(Gpu)
    first.deploy("old")
    assert first.get_handle().remote().result(10) == "7 old"
    first.deploy("new")
    assert first.get_handle().remote().result(10) == "7 new"
    assert [each.gpus for each in replicas("first")] == ["7"]

    second = first.options(name="second")
    goal = second.deploy("other", _blocking=False)
    wait_until(lambda: any("waits for 1 GPU: 1 of 1 in use on " in each.problem for each in replicas("second")))
    first.delete()
    goal.wait()
    assert second.get_handle().remote().result(10) == "7 other"
    second.delete()
