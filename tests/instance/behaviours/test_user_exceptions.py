"""Whatever user code raises ends its own call and nothing else."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cloudpickle
import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import lists, sampled_from, tuples
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

import qserve
from qserve import serve
from qserve.testing import TestInstance
from tests.support import raising
from tests.support.raising import RAISED, SLOTS
from tests.support.waiting import LIMIT_S

cloudpickle.register_pickle_by_value(raising)  # replicas need not find the tests


class Replicas:
    """One replica of each deployment, and every way to call it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=LIMIT_S)
        serve.deployment(name="raiser", max_concurrent_queries=SLOTS)(raising.Raiser).deploy()
        serve.deployment(name="on_thread", max_concurrent_queries=SLOTS)(raising.OnThread).deploy()
        serve.deployment(name="ingress", max_concurrent_queries=SLOTS)(raising.Ingress).deploy()
        self.raiser: Any = serve.get_deployment("raiser").get_handle()
        self.on_thread: Any = serve.get_deployment("on_thread").get_handle()
        methods = ("coroutine", "thread", "awaitable", "task", "generator", "async_generator", "batch", "result")
        paths = ("endpoint", "def", "middleware", "background", "stream")
        self.ways: dict[str, Callable[[str], object]] = {
            **{f"call {name}": self._call(getattr(self.raiser, name).remote) for name in methods},
            **{f"durable {name}": self._call(self._durable(name)) for name in ("coroutine", "thread", "generator")},
            **{f"stream {name}": self._stream(name) for name in ("generator", "async_generator", "thread")},
            "call on_thread": self._call(self.on_thread.remote),
            "http raiser": self._request("/raiser"),
            **{f"http ingress {path}": self._request(f"/ingress/{path}") for path in paths},
            "websocket": self._talk,
        }

    @staticmethod
    def pids() -> set[int]:
        return {replica.pid for status in serve.status().values() for replica in status.replicas}

    def close(self) -> None:
        self.http.close()

    def _call(self, remote: Callable[[str], Any]) -> Callable[[str], object]:
        def call(error: str) -> object:
            with pytest.raises(qserve.QServeError) as caught:
                remote(error).result(LIMIT_S)
            assert not isinstance(caught.value, qserve.GetTimeoutError | qserve.ReplicaDied), caught.value
            return caught.value

        return call

    def _durable(self, method: str) -> Callable[[str], Any]:
        return lambda error: self.raiser.options(method_name=method, durable=True).remote(error)

    def _stream(self, method: str) -> Callable[[str], object]:
        def read(error: str) -> object:
            with pytest.raises(qserve.QServeError) as caught:
                list(self.raiser.options(method_name=method, stream=True).remote(error))
            assert not isinstance(caught.value, qserve.GetTimeoutError | qserve.ReplicaDied), caught.value
            return caught.value

        return read

    def _request(self, path: str) -> Callable[[str], object]:
        def get(error: str) -> object:
            with contextlib.suppress(httpx.RemoteProtocolError):  # a stream that was cut
                answer = self.http.get(path, params={"error": error})
                assert answer.status_code in (200, 500), answer
            return None

        return get

    def _talk(self, error: str) -> object:
        with contextlib.suppress(WebSocketException):
            url = self.url.replace("http", "ws", 1)
            with connect(f"{url}/ingress/socket?error={error}", close_timeout=LIMIT_S) as socket:
                socket.recv(timeout=LIMIT_S)
        return None

    def have_all_their_slots(self) -> None:
        """As many calls as a replica runs at once meet each other there, so none of its slots is taken."""
        met = [self.raiser.meet.remote() for _ in range(SLOTS)]
        assert qserve.get(met, timeout=LIMIT_S) == ["met"] * SLOTS
        assert self.on_thread.remote("meet").result(LIMIT_S) == "met"
        with ThreadPoolExecutor(SLOTS) as pool:
            answers = list(pool.map(lambda _: self.http.get("/ingress/meet"), range(SLOTS)))
        assert [answer.json() for answer in answers] == ["met"] * SLOTS


@pytest.fixture
def replicas(qserve_instance: TestInstance) -> Iterator[Replicas]:
    found = Replicas(qserve_instance.url)
    yield found
    found.close()


@pytest.mark.timeout(240)
def test_every_slot_comes_back_whatever_was_raised_in_whatever_call(replicas: Replicas) -> None:
    before = replicas.pids()

    # Only one phase: a failure cannot be made smaller, because a slot that was lost stays lost.
    @settings(
        max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=[Phase.generate]
    )
    @given(lists(tuples(sampled_from(sorted(replicas.ways)), sampled_from(sorted(RAISED))), min_size=4, max_size=12))
    def check(calls: list[tuple[str, str]]) -> None:
        with ThreadPoolExecutor(len(calls)) as pool:
            list(pool.map(lambda call: replicas.ways[call[0]](call[1]), calls))
        replicas.have_all_their_slots()

    check()

    assert replicas.pids() == before  # and no replica had to be replaced for that


@pytest.mark.timeout(120)
def test_the_caller_gets_type_and_text_of_what_is_no_exception(replicas: Replicas) -> None:
    for error in ("PanicException", "SystemExit", "KeyboardInterrupt", "GeneratorExit"):
        for way in ("call coroutine", "call thread", "stream async_generator", "durable thread"):
            caught = replicas.ways[way](error)
            assert isinstance(caught, qserve.TaskError), way
            assert (caught.type_name.rpartition(".")[2], caught.message) == (error, "on purpose"), way
            assert "in throw" in caught.traceback_text, way
        assert replicas.http.get("/raiser", params={"error": error}).status_code == 500
        assert replicas.http.get("/ingress/endpoint", params={"error": error}).status_code == 500
