"""`qserve.testing.local`: deployments in the process of the test, through handles and HTTP."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from starlette.requests import Request

import qserve
from qserve import serve
from qserve.broker.instance.state import GenerationChanged
from qserve.context import current_call
from qserve.deployments.driver import THIS_PROCESS
from qserve.errors import ConfigurationError
from qserve.testing import LocalServing, instance, local
from qserve.wire.spec import HttpSettings
from tests.support.slowness import patience
from tests.support.waiting import until, wait_until

app = FastAPI()


class Refused(Exception):
    pass


@serve.deployment(route_prefix=None, max_queued_requests=2)
class Prices:
    def __init__(self, cents: int = 30) -> None:
        self.cents = cents
        self.thread = threading.get_ident()

    def of(self, fruit: str) -> int:
        assert threading.get_ident() == self.thread
        if fruit == "plum":
            raise Refused(fruit)
        return self.cents

    async def wait(self) -> None:
        await asyncio.sleep(60)

    def count(self, most: int) -> Iterator[int]:
        yield from range(most)

    async def count_here(self, most: int) -> AsyncIterator[int]:
        for number in range(most):
            yield number
        if most == 2:
            raise Refused("2")

    def reconfigure(self, config: dict[str, int]) -> None:
        self.cents = config["cents"]

    def where(self) -> str:
        return serve.get_replica_context().deployment


@serve.deployment(route_prefix="/shop")
@serve.ingress(app)
class Shop:
    def __init__(self, prices: Any) -> None:
        self.prices = prices

    @app.get("/total")
    async def total(self, fruit: str, n: int) -> dict[str, int]:
        refs = [self.prices.of.remote(fruit) for _ in range(n)]
        return {"cents": sum([await ref for ref in refs])}

    @app.get("/where")
    async def where(self) -> list[str]:
        return [serve.get_replica_context().deployment, await self.prices.where.remote()]

    @app.get("/slowly")
    async def slowly(self) -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "one "
            yield "two"

        return StreamingResponse(parts())

    @app.websocket("/echo")
    async def echo(self, socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text((await socket.receive_text()).upper())


async def async_parts() -> AsyncIterator[str]:
    for number in range(3):
        yield f"{number}\n"


@serve.deployment
def plain(request: Request) -> Any:
    if request.query_params.get("how") == "parts":
        return (f"{n}\n" for n in range(3))
    if request.query_params.get("how") == "async parts":
        return async_parts()
    return {"path": request.url.path, "method": request.method}


begun, ended = threading.Event(), threading.Event()


@serve.deployment(max_concurrent_queries=1)
async def one_at_a_time(request: Request) -> str:
    if not request.query_params:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
    return "done"


shop = Shop.bind(Prices.bind(cents=45))


@pytest.fixture(scope="module")
def served() -> Iterator[LocalServing]:
    with local(shop) as served:
        yield served


def prices() -> Any:
    return serve.get_deployment("Prices").get_handle()


@pytest.mark.parametrize("name", ["Alone", "composed", "build"])
def test_what_is_named_as_for_the_command_line_has_a_handle(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "named_for_local.py").write_text(
        """
from qserve import serve

@serve.deployment
class Alone:
    def __init__(self, other=None):
        self.other = other
    async def word(self):
        return "alone" if self.other is None else "with " + await self.other.word.remote()

composed = Alone.bind(Alone.options(name="Other").bind())
def build():
    return composed
"""
    )
    with local(f"named_for_local:{name}") as served:
        assert served.handle is not None
        expected = "alone" if name == "Alone" else "with alone"
        assert served.handle.word.remote().result(timeout=patience(10)) == expected


def test_an_application_answers_over_http(served: LocalServing) -> None:
    assert served.client.get("/shop/total", params={"fruit": "pear", "n": 2}).json() == {"cents": 90}
    assert served.client.get("/shop/total").status_code == 422
    assert served.client.get("/elsewhere").status_code == 404
    assert served.client.get("/shop/slowly").text == "one two"


def test_each_deployment_knows_which_one_it_is(served: LocalServing) -> None:
    assert served.client.get("/shop/where").json() == ["Shop", "Prices"]


def test_a_websocket_talks_to_the_application(served: LocalServing) -> None:
    with served.client.websocket_connect("/shop/echo") as socket:
        socket.send_text("hello")
        assert socket.receive_text() == "HELLO"


@pytest.mark.usefixtures("served")
def test_handles_call_and_errors_are_what_was_raised() -> None:
    assert prices().of.remote("pear").result(timeout=10) == 45
    with pytest.raises(Refused) as caught:
        prices().of.remote("plum").result(timeout=10)
    assert isinstance(caught.value, qserve.TaskError)
    with pytest.raises(qserve.MethodNotFound):
        prices().none.remote().result(timeout=10)


@pytest.mark.usefixtures("served")
def test_what_cannot_be_sent_fails_here_too() -> None:
    with pytest.raises(qserve.ValueNotSerializable):
        prices().of.remote(threading.Lock())


@pytest.mark.usefixtures("served")
def test_a_stream_comes_in_parts() -> None:
    streaming = prices().options(stream=True)
    assert list(streaming.count.remote(3)) == [0, 1, 2]
    for _ in range(5):
        assert list(streaming.count_here.remote(3)) == [0, 1, 2]


@pytest.mark.usefixtures("served")
def test_the_parts_before_an_error_are_not_lost() -> None:
    stream = iter(prices().options(stream=True).count_here.remote(2))
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(Refused):
        next(stream)


@pytest.mark.usefixtures("served")
def test_a_deadline_passes_and_a_full_queue_refuses() -> None:
    waiting = [prices().options(timeout_s=0.3).wait.remote() for _ in range(2)]
    with pytest.raises(qserve.BackPressureError):
        prices().wait.remote().result(timeout=10)
    for ref in waiting:
        with pytest.raises(qserve.GetTimeoutError):
            ref.result(timeout=10)
        assert ref.done()
    wait_until(lambda: not isinstance(prices().of.remote("apple").exception(10), qserve.BackPressureError))


CALLS: list[Any] = []


@serve.deployment(route_prefix=None)
class Leaves:
    async def __call__(self) -> None:
        CALLS.append(current_call.get())  # as a task has it that the call leaves behind


def test_its_deadline_does_not_hold_for_what_a_call_leaves_behind() -> None:
    with local(Leaves) as served:
        assert served.handle is not None
        served.handle.options(timeout_s=patience(30)).remote().result(patience(30))
    assert CALLS.pop().limit(3600) == 3600


@pytest.mark.usefixtures("served")
def test_a_call_that_is_cancelled_makes_room() -> None:
    ref = prices().wait.remote()
    assert ref.cancel()
    with pytest.raises(qserve.CallCancelled):
        ref.result(timeout=10)


def test_a_plain_deployment_gets_a_request_and_may_stream() -> None:
    with local(plain) as served:
        assert served.client.post("/plain/x").json() == {"path": "/plain/x", "method": "POST"}
        for how in ("parts", "async parts"):
            assert served.client.get("/plain", params={"how": how}).text == "0\n1\n2\n"
        assert served.handle is not None


async def test_the_application_can_be_called_on_any_event_loop() -> None:
    with local(plain) as served:
        transport = httpx.ASGITransport(app=served.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answers = await asyncio.gather(*(client.get("/plain") for _ in range(5)))
    assert {answer.status_code for answer in answers} == {200}


async def test_a_client_that_gives_up_ends_its_request_and_makes_room() -> None:
    with local(one_at_a_time) as served:
        transport = httpx.ASGITransport(app=served.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            slow = asyncio.create_task(client.get("/one_at_a_time"))
            await until(begun.is_set)
            slow.cancel()
            await until(ended.is_set)
            assert (await asyncio.wait_for(client.get("/one_at_a_time?now=1"), patience(5))).text == "done"


async def test_the_application_can_live_in_a_server_that_runs_lifespans() -> None:
    told: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    for event in ("startup", "shutdown"):
        told.put_nowait({"type": f"lifespan.{event}"})
    said = []

    async def send(message: Any) -> None:
        said.append(message["type"])

    with local(plain) as served:
        await served.app({"type": "lifespan"}, told.get, send)
    assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_what_a_server_raises_while_it_sends_reaches_it() -> None:
    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        raise Refused("the client is gone")

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/plain",
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
    }
    with local(plain) as served, pytest.raises(Refused):
        await served.app(scope, receive, send)


def test_a_route_belongs_to_one_deployment() -> None:
    with local(plain), pytest.raises(ValueError, match="route_prefix '/plain' is already registered"):
        Prices.options(name="other", route_prefix="/plain").deploy()


@serve.deployment(name="Models", route_prefix="/models")
class Models:
    @serve.multiplexed(max_num_models_per_replica=2)
    async def load(self, model: str) -> str:
        return model.upper()

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.01)
    async def run(self, numbers: list[int]) -> list[str]:
        model = await self.load(serve.get_multiplexed_model_id())
        return [f"{model}{number}" for number in numbers]

    async def one(self, number: int) -> str:
        return await self.run(number)

    async def __call__(self, request: Request) -> list[str | None]:
        return [await self.load(), serve.get_replica_context().request_id]


def test_a_call_knows_its_model_and_its_id() -> None:
    with local(Models) as served:
        assert served.handle is not None
        refs = [served.handle.options(multiplexed_model_id="ab"[n % 2]).one.remote(n) for n in range(4)]
        assert qserve.get(refs, timeout=10) == ["A0", "B1", "A2", "B3"]
        headers = {"serve_multiplexed_model_id": "m", "x-request-id": "mine"}
        assert served.client.get("/models", headers=headers).json() == ["M", "mine"]


began, cancelled = threading.Event(), threading.Event()


@serve.deployment(route_prefix=None)
class Inner:
    async def __call__(self) -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise


@serve.deployment(route_prefix=None)
class Outer:
    async def __call__(self) -> None:
        ref = await Inner.get_handle(sync=False).remote()
        await ref


def test_what_a_cancelled_call_has_called_is_cancelled_too() -> None:
    with local([Inner, Outer]):
        ref = Outer.get_handle().remote()
        assert began.wait(10)
        assert ref.cancel()
        assert cancelled.wait(10)


def test_a_new_config_reaches_the_instance_and_deleting_ends_it() -> None:
    with local([Prices]) as served:
        assert served.handle is None
        serve.get_deployment("Prices").options(user_config={"cents": 7}).deploy()
        assert prices().of.remote("pear").result(timeout=10) == 7
        assert [*serve.list_deployments()] == ["Prices"]
        serve.delete("Prices")
        assert serve.list_deployments() == {}
        with pytest.raises(qserve.DeploymentNotFound):
            Prices.get_handle().of.remote("pear").result(timeout=10)


@serve.deployment(route_prefix=None)
class Deploys:
    async def __call__(self) -> None:
        Prices.deploy()


def test_deploying_from_the_loop_that_would_do_it_is_refused() -> None:
    with local(Deploys), pytest.raises(RuntimeError, match="would block the event loop"):
        Deploys.get_handle().remote().result(timeout=10)


def test_what_nobody_else_deploys_is_only_what_was_deployed_here() -> None:
    with local(plain):
        state = THIS_PROCESS.current().state
        spec = state.list()["plain"].spec
        with pytest.raises(GenerationChanged):
            state.deploy(spec, expected=0)
        assert state.delete("nobody") is None
        state.set_http(HttpSettings(root_path="/shop"))
        assert state.get_http().root_path == "/shop"


def test_a_constructor_that_raises_says_so() -> None:
    with (
        pytest.raises(RuntimeError, match=r"'Prices' could not be constructed: TypeError") as caught,
        local(Prices.bind(none=1)),
    ):
        pass
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.usefixtures("served")
def test_afterwards_everything_is_as_before() -> None:
    before = set(threading.enumerate())
    with local(plain):
        assert [*serve.list_deployments()] == ["plain"]
    assert {thread for thread in threading.enumerate() if thread.name == "qserve-client"} <= before
    assert sorted(serve.list_deployments()) == ["Prices", "Shop"]
    with pytest.raises(qserve.QServeError, match="only be called from within a replica"):
        serve.get_replica_context()


def test_refs_and_streams_of_before_say_that_their_client_was_stopped() -> None:
    with local(Prices) as served:
        assert served.handle is not None
        stream = served.handle.options(stream=True).count_here.remote(10**9)
        ref = served.handle.options(durable=True).of.remote("fig")
        assert (next(stream), ref.result(patience(30))) == (0, 30)
        pending = served.handle.wait.remote()

    with pytest.raises(qserve.CallCancelled, match="the client was stopped"):
        pending.result(patience(10))
    with pytest.raises(qserve.CallCancelled, match="the client was stopped"):
        list(stream)
    with pytest.raises(qserve.BrokerUnavailable, match="a client that was stopped"):
        ref.status()
    with pytest.raises(qserve.BrokerUnavailable, match="a client that was stopped"):
        asyncio.run(ref.astatus())


def test_it_takes_milliseconds() -> None:
    with local(plain):  # what has to be imported is
        pass
    began = time.perf_counter()
    for _ in range(5):
        with local(plain) as served:
            assert served.handle is not None
    assert (time.perf_counter() - began) / 5 < patience(0.5)


@pytest.mark.usefixtures("served")
def test_a_whole_instance_is_not_started_meanwhile() -> None:
    with pytest.raises(ConfigurationError, match="while deployments run in this process"), instance():
        pass


def test_the_fixture_of_the_plugin_runs_it(qserve_local: Callable[[Any], LocalServing]) -> None:
    assert qserve_local(plain).client.get("/plain").status_code == 200
