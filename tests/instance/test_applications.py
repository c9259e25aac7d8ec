"""Applications against a whole instance: graphs, names, routes, handles and responses."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

import qserve
from qserve import serve
from qserve.serve import DeploymentHandle, DeploymentResponse
from qserve.testing import TestInstance
from tests.support.slowness import patience


@serve.deployment(max_ongoing_requests=5, ray_actor_options={"runtime_env": {"env_vars": {"QS_TEST_BIAS": "7"}}})
class Adder:
    def __init__(self, n: int) -> None:
        self.n = n + int(os.environ.get("QS_TEST_BIAS", "0"))

    def __call__(self, x: int) -> int:
        return x + self.n

    def count(self, limit: int) -> Iterator[int]:
        yield from range(limit)


@serve.deployment
class Driver:
    def __init__(self, adders: list[DeploymentHandle[Any]], named: dict[str, DeploymentHandle[Any]]) -> None:
        self.adders = adders
        self.named = named

    async def __call__(self, request: Any) -> dict[str, Any]:
        first: DeploymentResponse[int] = self.adders[0].remote(int(request.query_params["x"]))
        second = self.adders[1].remote(first)  # the response stands for its value
        several = await asyncio.gather(*[self.adders[0].remote(n) for n in range(3)])
        app = serve.get_replica_context().app_name
        by_name = await serve.get_deployment_handle("Adder").remote(0)
        return {"sum": await second, "several": several, "app": app, "by name": by_name}

    async def count(self, limit: int) -> AsyncIterator[int]:
        async for part in self.named["first"].options(method_name="count", stream=True).remote(limit):
            yield part


@serve.deployment
class Passing:
    def __init__(self, adder: DeploymentHandle[Any]) -> None:
        self.adder = adder

    async def __call__(self) -> Any:
        return await self.adder.remote(1)


def graph() -> Any:
    first = Adder.bind(1)
    return Driver.bind([first, Adder.bind(10)], {"first": first})


def test_a_graph_is_deployed_called_replaced_and_deleted(qserve_instance: TestInstance, http: httpx.Client) -> None:
    handle = serve.run(graph())
    assert http.get("/?x=1").json() == {"sum": 26, "several": [8, 9, 10], "app": "default", "by name": 8}
    stream = handle.options(method_name="count", stream=True).remote(4)
    assert list(stream) == [0, 1, 2, 3]

    serve.run(graph(), name="two", route_prefix="/two")
    assert http.get("/two?x=1").json()["app"] == "two"
    found = serve.status().applications
    assert {name: (each.status, each.route_prefix) for name, each in found.items()} == {
        "default": ("RUNNING", "/"),
        "two": ("RUNNING", "/two"),
    }
    assert sorted(found["two"].deployments) == ["Adder", "Adder_1", "Driver"]
    assert serve.get_deployment_handle("Adder_1", "two").remote(1).result(timeout_s=patience(20)) == 18
    with pytest.raises(ValueError, match=r"cannot have the route '/': it belongs to the deployment 'Driver'"):
        serve.run(graph(), name="three")
    assert "three.Adder" not in serve.status()

    serve.run(Adder.bind(5))  # another application under the same name, and with the same route
    assert set(serve.status()) == {"Adder", "two.Adder", "two.Adder_1", "two.Driver"}
    assert serve.get_app_handle("default").remote(1).result(patience(20)) == 13
    serve.run(Passing.bind(Adder.bind(5)))  # its root becomes a part, and gives up its route
    assert http.get("/").json() == 13
    serve.delete("two")
    assert set(serve.status()) == {"Adder", "Passing"}
    with pytest.raises(qserve.QServeError, match="Application 'two' does not exist"):
        serve.get_app_handle("two")


@serve.deployment
class Part:
    def __init__(self, value: int, *parts: DeploymentHandle[Any]) -> None:
        if value < 0:
            raise ValueError(f"no part {value}")
        self.value = value
        self.parts = parts

    async def __call__(self) -> list[Any]:
        return [self.value, *[await part.remote() for part in self.parts]]


def test_an_application_of_which_some_deployments_fail_says_which_serve_what(qserve_instance: TestInstance) -> None:
    def parts(version: str, first: int, second: int, root: int) -> Any:
        part = Part.options(version=version)
        added = [part.options(name="Third").bind(first)] if version == "3" else []
        return part.options(name="Root").bind(root, part.bind(first), part.bind(second), *added)

    handle: Any = serve.run(parts("1", 1, 1, 1), name="parted")
    assert handle.remote().result(patience(20)) == [1, [1], [1]]

    with pytest.raises(RuntimeError, match="no part -2") as failed:
        serve.run(parts("2", -2, -2, 2), name="parted")
    assert str(failed.value).count("Failed to reach deployment goal") == 2  # each is rolled back
    assert (
        "The application 'parted' is left with deployments of different deploys (new: parted.Root version 2; "
        "as before: parted.Part version 1, parted.Part_1 version 1). Deploy it again"
    ) in str(failed.value)
    assert handle.remote().result(patience(20)) == [2, [1], [1]]

    with pytest.raises(RuntimeError, match=r"as before: parted\.Part version 1; not there: parted\.Third"):
        serve.run(parts("3", -3, 3, 3), name="parted")
    serve.run(parts("3", 3, 3, 3), name="parted")
    assert handle.remote().result(patience(20)) == [3, [3], [3], [3]]
    serve.delete("parted")


def test_responses(qserve_instance: TestInstance) -> None:
    handle = serve.run(Adder.bind(0), route_prefix=None)

    async def call() -> Any:
        response = handle.remote(1)
        stream = handle.options(method_name="count", stream=True).remote(2)
        return await response, [await anext(stream), await anext(stream)], response.request_id

    value, parts, request_id = asyncio.run(call())
    assert (value, parts) == (8, [0, 1])
    assert request_id
    stream = handle.options(method_name="count", stream=True).remote(1)
    assert (next(stream), next(stream, "end")) == (0, "end")
    assert [each.remote(1).result(patience(20)) for each in serve.run_many([serve.RunTarget(Adder.bind(0))])] == [8]


@serve.deployment
class Zoo:
    @serve.multiplexed(max_num_models_per_replica=2)
    async def load(self, model_id: str) -> str:
        return model_id.upper()

    async def __call__(self, request: Any = None) -> str:
        return await self.load(serve.get_multiplexed_model_id())

    async def parts(self) -> AsyncIterator[str]:
        yield await self.load(serve.get_multiplexed_model_id())


def test_a_call_says_which_model_it_is_for(qserve_instance: TestInstance, http: httpx.Client) -> None:
    handle = serve.run(Zoo.bind()).options(multiplexed_model_id="a")
    assert handle.remote().result(patience(20)) == "A"
    assert list(handle.options(method_name="parts", stream=True).remote()) == ["A"]
    assert http.get("/", headers={"serve_multiplexed_model_id": "b"}).text == "B"
    assert http.get("/").status_code == 500
    assert http.get("/", headers={"x-request-timeout-seconds": "soon"}).status_code == 400
