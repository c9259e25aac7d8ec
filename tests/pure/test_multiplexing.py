"""`serve.multiplexed`: which models are kept, loaded and let go."""

import asyncio
from typing import Any, ClassVar

import pytest

from qserve import serve
from qserve.context import CallInfo, current_call
from qserve.telemetry.user_metrics import MICRO, take_counts


class Model:
    gone: ClassVar[list[str]] = []

    def __init__(self, name: str) -> None:
        self.name = name

    async def __del__(self) -> None:
        Model.gone.append(self.name)


class Host:
    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.batches: list[tuple[str, list[int]]] = []

    @serve.multiplexed(max_num_models_per_replica=2)
    async def get(self, model_id: str) -> str:
        self.loaded.append(model_id)
        await asyncio.sleep(0)
        if model_id == "bad":
            raise KeyError(model_id)
        return model_id.upper()

    @serve.batch(max_batch_size=3, batch_wait_timeout_s=5)
    async def predict(self, inputs: list[int]) -> list[str]:
        model = await self.get()
        self.batches.append((serve.get_multiplexed_model_id(), inputs))
        return [f"{model}:{each}" for each in inputs]


async def test_the_least_recently_used_model_leaves() -> None:
    host = Host()
    for model in ("a", "b", "a", "c", "a", "b"):
        assert await host.get(model) == model.upper()
    assert host.loaded == ["a", "b", "c", "b"]


async def test_what_is_loaded_and_what_was_there_is_counted() -> None:
    take_counts()
    host = Host()
    for model in ("a", "b", "a", "c", "a", "b"):
        await host.get(model)
    counts = {series.metric: sum(series.fields.values()) for series in take_counts()[0]}
    assert counts == {
        "qserve_models_asked_for": 6 * MICRO,
        "qserve_models_loaded": 4 * MICRO,
        "qserve_models_let_go": 2 * MICRO,
    }


async def test_a_model_is_loaded_once_for_all_who_wait_and_an_error_is_not_kept() -> None:
    host = Host()
    assert await asyncio.gather(*(host.get("a") for _ in range(5))) == ["A"] * 5
    found = await asyncio.gather(host.get("bad"), host.get("bad"), return_exceptions=True)
    assert [type(each) for each in found] == [KeyError, KeyError]
    with pytest.raises(KeyError):
        await host.get("bad")
    assert host.loaded == ["a", "bad", "bad"]


async def test_a_withdrawn_call_takes_the_model_from_nobody() -> None:
    host = Host()
    first, second = asyncio.ensure_future(host.get("a")), asyncio.ensure_future(host.get("a"))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == "A"
    assert host.loaded == ["a"]


@pytest.mark.filterwarnings("ignore:coroutine 'Model.__del__' was never awaited")
async def test_an_asynchronous_destructor_is_awaited_when_a_model_leaves() -> None:
    @serve.multiplexed(max_num_models_per_replica=1)
    async def get(model_id: str) -> Model:
        return Model(model_id)

    await get("one")
    await get("two")
    assert Model.gone == ["one"]


async def test_batches_are_split_by_model() -> None:
    host = Host()

    async def call(model: str, value: int) -> Any:
        current_call.set(CallInfo("id", model_id=model))
        return await host.predict(value)

    found = await asyncio.gather(*(call("ab"[n % 2], n) for n in range(6)))
    assert found == ["A:0", "B:1", "A:2", "B:3", "A:4", "B:5"]
    assert sorted(host.batches) == [("a", [0, 2, 4]), ("b", [1, 3, 5])]


async def test_who_names_no_model_is_told() -> None:
    with pytest.raises(ValueError, match="cannot be empty: did the caller name one"):
        await Host().get()
    with pytest.raises(TypeError, match="takes the id of a model, a string"):
        await Host().get(3)


def test_loaders_and_limits_that_are_not_possible() -> None:
    with pytest.raises(TypeError, match="expects an `async def`"):
        serve.multiplexed(lambda model_id: model_id)
    with pytest.raises(ValueError, match="must be positive"):
        serve.multiplexed(max_num_models_per_replica=0)
    with pytest.raises(TypeError, match="one parameter besides"):

        @serve.multiplexed
        async def load(one: str, other: str) -> None: ...
