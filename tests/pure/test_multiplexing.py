"""`serve.multiplexed`: which models are kept, loaded and let go."""

import asyncio
import contextlib
import gc
import weakref
from typing import Any, ClassVar

import pytest

from qserve import serve
from qserve.context import CallInfo, current_call
from qserve.telemetry.user_metrics import MICRO, take_counts
from tests.support.local_code import Running, running
from tests.support.slowness import patience
from tests.support.waiting import until


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


class Gated:
    """Its loader waits until the test lets it go on, and fails the first time."""

    def __init__(self) -> None:
        self.begun, self.go, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.times = 0

    @serve.multiplexed
    async def get(self, model_id: str) -> str:
        self.times += 1
        self.begun.set()
        await self.go.wait()
        self.ended.set()
        if self.times == 1:
            raise ConnectionError("the store does not answer")
        return model_id.upper()


async def test_an_error_of_the_loader_keeps_nothing_of_those_who_waited() -> None:
    class Request:
        """What a call has at hand while it waits for its model."""

    class Zoo:
        @serve.multiplexed
        async def load(self, model_id: str) -> str:
            raise ValueError(model_id)

    requests: weakref.WeakSet[Request] = weakref.WeakSet()
    zoo = Zoo()

    async def call() -> None:
        request = Request()
        requests.add(request)
        with contextlib.suppress(ValueError):
            await zoo.load("lion")

    gc.disable()
    try:
        await asyncio.gather(call(), call())
        await until(lambda: not requests)
    finally:
        gc.enable()


async def test_a_model_whose_loading_failed_when_nobody_waited_any_more_is_loaded_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = Gated()
    first = asyncio.create_task(host.get("a"))
    await host.begun.wait()
    first.cancel()
    await asyncio.wait([first])
    host.go.set()
    await host.ended.wait()
    assert await host.get("a") == "A"
    assert host.times == 2
    (record,) = caplog.records
    assert record.getMessage().startswith("Model 'a' could not be loaded. No call waits for it")
    assert record.exc_info is not None


async def test_a_loader_belongs_to_no_call() -> None:
    seen = []

    @serve.multiplexed
    async def get(model_id: str) -> str:
        seen.append((current_call.get(), serve.get_multiplexed_model_id()))
        return model_id

    async def call() -> str:
        current_call.set(CallInfo("id", model_id="b"))
        return await get("a") + await get()

    assert await asyncio.create_task(call()) == "ab"
    assert seen == [(None, "a"), (None, "b")]


async def test_what_a_loader_raises_ends_no_more_than_the_calls_that_wait_for_it() -> None:
    @serve.multiplexed
    async def get(model_id: str) -> str:
        await asyncio.sleep(0)
        raise SystemExit(model_id) if model_id == "exit" else asyncio.CancelledError

    with pytest.raises(SystemExit):
        await get("exit")
    with pytest.raises(asyncio.CancelledError):
        await get("cancelled")


async def test_a_loader_may_call_that_of_its_base_class() -> None:
    class Base:
        @serve.multiplexed
        async def get(self, model_id: str) -> str:
            return f"base of {model_id}"

    class Sub(Base):
        @serve.multiplexed
        async def get(self, model_id: str) -> str:
            return f"{await super().get(model_id)}, and more"

    async with asyncio.timeout(patience(10)):
        assert await Sub().get("a") == "base of a, and more"


class Zoo:
    @serve.multiplexed(max_num_models_per_replica=2)
    async def get(self, model_id: str) -> Model:
        return Model(model_id)

    async def __call__(self, model_id: str) -> str:
        return (await self.get(model_id)).name

    def __del__(self) -> None:
        Model.gone.append("the zoo")


async def test_an_asynchronous_destructor_is_awaited_when_a_model_leaves_and_when_its_replica_ends() -> None:
    def call(replica: Running, name: str) -> asyncio.Task[Any]:
        return asyncio.create_task(replica.call("", name), context=replica.code.context.copy())

    Model.gone.clear()
    async with running(Zoo) as other:
        async with running(Zoo) as replica:
            assert await call(other, "four") == "four"
            for name in ("one", "two", "three"):
                assert await call(replica, name) == name
            assert Model.gone == ["one"]
        assert Model.gone == ["one", "the zoo", "two", "three"]
    assert Model.gone.count("four") == 1
    gc.collect()  # where a destructor would run once more, and not be awaited


async def test_a_destructor_that_raises_fails_no_call(caplog: pytest.LogCaptureFixture) -> None:
    class Bad:
        def __init__(self, name: str) -> None:
            self.name = name

        async def __del__(self) -> None:
            raise SystemExit if self.name == "exit" else OSError("the device is busy")

    class BadZoo:
        @serve.multiplexed(max_num_models_per_replica=1)
        async def get(self, model_id: str) -> Bad:
            return Bad(model_id)

        async def __call__(self, model_id: str) -> str:
            return (await self.get(model_id)).name

    async with running(BadZoo) as replica:
        for name in ("one", "exit", "three"):
            assert await replica.call("", name) == name
    assert [record.getMessage() for record in caplog.records] == [
        f"Exception in __del__ of model {name!r}, which has left all the same" for name in ("one", "exit", "three")
    ]


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
