"""User code inside a replica: construction, calls, requests and responses, the end."""

import asyncio
import dataclasses
import datetime
import functools
import gc
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from typing import Any
from uuid import UUID

import msgspec
import numpy as np
import pydantic
import pytest
from fastapi import HTTPException as FastAPIException
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse

from qserve.context import CallInfo, ReplicaRank, current_call, get_replica_context
from qserve.deployments.deployment import deployment
from qserve.errors import MethodNotFound, QServeError, ResultNotSerializable
from qserve_workers.user.user_code import UserCode
from tests.support.local_code import CODEC, running
from tests.support.slowness import patience

precision: ContextVar[int] = ContextVar("precision")

# Construction


async def test_init_may_return_something_and_may_be_async() -> None:
    class Sync:
        def __init__(self, number: int) -> None:
            self.number = number
            return True  # type: ignore[return-value]  # noqa: PLE0101

        def get(self) -> int:
            return self.number

    class Async:
        async def __init__(self, number: int) -> None:  # type: ignore[misc]
            await asyncio.sleep(0)
            self.number = number

        async def get(self) -> int:
            return self.number

    async with running(Sync, 1) as one, running(Async, 2) as two:
        assert (await one.call("get"), await two.call("get")) == (1, 2)


async def test_what_constructors_and_reconfigure_set_in_the_context_holds_for_all_calls() -> None:
    class Sync:
        def __init__(self) -> None:
            precision.set(5)

        def reconfigure(self, config: int) -> None:
            precision.set(precision.get() + config)

    class Async:
        async def __init__(self) -> None:  # type: ignore[misc]
            precision.set(6)

        async def reconfigure(self, config: int) -> None:
            precision.set(precision.get() + config)

    async with running(Sync) as one, running(Async) as two:
        assert (one.code.context[precision], two.code.context[precision]) == (5, 6)
        for each in (one, two):
            await each.code.reconfigure(CODEC.pack(10))
        assert (one.code.context[precision], two.code.context[precision]) == (15, 16)
    assert precision.get(None) is None


async def test_new_gets_the_arguments_where_the_class_has_one() -> None:
    class Made:
        def __new__(cls, number: int) -> "Made":
            made = super().__new__(cls)
            made.doubled = number * 2
            return made

        def __init__(self, number: int) -> None:
            self.number = number

        doubled: int

        def both(self) -> tuple[int, int]:
            return self.number, self.doubled

    async with running(Made, 2) as replica:
        assert await replica.call("both") == (2, 4)


async def test_a_constructor_that_raises_raises_here() -> None:
    class Broken:
        def __init__(self) -> None:
            raise ZeroDivisionError("in the constructor")

    with pytest.raises(ZeroDivisionError):
        async with running(Broken):
            pass


async def test_a_def_method_that_looks_for_the_event_loop_is_told_where_it_is() -> None:
    class Background:
        def begin(self) -> None:
            asyncio.get_running_loop()

    async with running(Background) as replica:
        with pytest.raises(RuntimeError, match="no running event loop") as raised:
            await replica.call("begin")
    (note,) = raised.value.__notes__
    assert "goes into an `async def`" in note


@pytest.mark.parametrize("is_async", [False, True])
async def test_user_config_is_applied_after_construction_and_again_when_it_changes(is_async: bool) -> None:
    class Sync:
        def __init__(self) -> None:
            self.configs: list[Any] = []

        def reconfigure(self, config: Any) -> None:
            self.configs.append(config)

        def get(self) -> list[Any]:
            return self.configs

    class Async(Sync):
        async def reconfigure(self, config: Any) -> None:  # type: ignore[override]
            self.configs.append(config)

    async with running(Async if is_async else Sync, user_config={"n": 1}) as replica:
        await replica.code.reconfigure(CODEC.pack("second"))
        assert await replica.call("get") == [{"n": 1}, "second"]


async def test_reconfigure_may_ask_for_the_rank_of_its_replica() -> None:
    class Ranked:
        def reconfigure(self, config: Any, rank: ReplicaRank) -> None:
            self.seen = [config, rank.rank, get_replica_context().rank.rank]

        def get(self) -> list[Any]:
            return self.seen

    async with running(Ranked, user_config="first") as replica:
        assert await replica.call("get") == ["first", 0, 0]


async def test_user_config_without_reconfigure_fails_the_construction() -> None:
    class Without:
        pass

    def function() -> None: ...

    with pytest.raises(ValueError, match="'Without' is missing reconfigure method"):
        async with running(Without, user_config=1):
            pass
    with pytest.raises(ValueError, match="'function' is a function"):
        async with running(function, user_config=1):
            pass


# Where code runs


async def test_sync_code_runs_on_one_thread_constructor_and_destructor_too() -> None:
    threads = []

    class Threaded:
        def __init__(self) -> None:
            threads.append(threading.get_ident())

        def __call__(self) -> None:
            threads.append(threading.get_ident())

        def reconfigure(self, _: Any) -> None:
            threads.append(threading.get_ident())

        def __del__(self) -> None:
            threads.append(threading.get_ident())

    async with running(Threaded, user_config=1) as replica:
        await asyncio.gather(*(replica.call() for _ in range(5)))
    assert len(threads) == 8
    assert set(threads) == {threads[0]}
    assert threads[0] != threading.get_ident()


async def test_sync_methods_never_overlap_unless_max_threads_allows_it() -> None:
    class Counter:
        def __init__(self) -> None:
            self.inside = self.most = 0
            self.lock = threading.Lock()
            self.two_inside = threading.Event()

        def __call__(self, wait: bool) -> int:
            with self.lock:
                self.inside += 1
                self.most = max(self.most, self.inside)
            if self.most == 2:
                self.two_inside.set()
            if wait:
                self.two_inside.wait(10)
            with self.lock:
                self.inside -= 1
            return self.most

    async with running(Counter) as replica:
        assert await asyncio.gather(*(replica.call("", False) for _ in range(10))) == [1] * 10
        assert replica.code.needs_thread("")
    async with running(Counter, max_threads=2) as replica:
        assert max(await asyncio.gather(*(replica.call("", True) for _ in range(2)))) == 2


async def test_async_methods_overlap_on_the_event_loop() -> None:
    class Meeting:
        def __init__(self) -> None:
            self.barrier = asyncio.Barrier(3)

        async def __call__(self) -> int:
            return await self.barrier.wait()

    async with running(Meeting) as replica:
        assert sorted(await asyncio.gather(*(replica.call() for _ in range(3)))) == [0, 1, 2]
        assert not replica.code.needs_thread("")


# Calls from Python


async def test_arguments_pass_through_unchanged() -> None:
    def function(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    async with running(function) as replica:
        assert await replica.call("", 1, "two", three=[3]) == ((1, "two"), {"three": [3]})


async def test_surplus_arguments_are_a_type_error() -> None:
    def no_params() -> str:
        return "hello"

    async def no_params_async() -> str:
        return "hello"

    for function in (no_params, no_params_async):
        async with running(function) as replica:
            assert await replica.call() == "hello"
            with pytest.raises(TypeError, match="takes 0 positional arguments but 1 was given"):
                await replica.call("", 1)
            with pytest.raises(TypeError, match="got an unexpected keyword argument 'key'"):
                await replica.call("", key=1)


class Methods:
    """Has methods of every kind."""

    attribute = 3

    def __init__(self) -> None:
        self.own = lambda: "own"

    def exists(self) -> str:
        return "exists"

    @staticmethod
    def static() -> str:
        return "static"

    @classmethod
    def klass(cls) -> str:
        return cls.__name__

    @property
    def looked_at(self) -> Any:
        raise AssertionError("a property that nobody calls is not looked at")

    def _private(self) -> str:
        return "private"


async def test_an_unknown_method_names_those_there_are() -> None:
    class OnlyOne:
        def __call__(self) -> None: ...

        def exists(self) -> None: ...

    text = r"Tried to call a method 'nope' that does not exist\. Available methods: \['exists'\]\."
    async with running(OnlyOne) as replica:
        with pytest.raises(MethodNotFound, match=text):
            await replica.call("nope")
    async with running(Methods) as replica:
        assert replica.code.available_methods == ["_private", "exists", "klass", "own", "static"]
        for name in ("", "__call__", "__init__", "__class__", "attribute", "nope"):
            with pytest.raises(MethodNotFound):
                await replica.call(name)


async def test_methods_of_every_kind_can_be_called() -> None:
    async with running(Methods) as replica:
        names = ("exists", "static", "klass", "own")
        assert [await replica.call(name) for name in names] == ["exists", "static", "Methods", "own"]


class Computed:
    """Has methods that are found out at the call."""

    @functools.singledispatchmethod
    def show(self, value: object) -> str:
        return f"object on {threading.current_thread().name}"

    @show.register
    def _(self, value: int) -> str:
        return f"int {value}"

    @functools.singledispatchmethod
    async def wait(self, value: object) -> str:
        return threading.current_thread().name

    @functools.cached_property
    def model(self) -> Any:
        self.made = [*getattr(self, "made", []), threading.current_thread().name]
        return lambda x: x * 2

    @property
    def adder(self) -> Any:
        return lambda a, b: a + b

    @property
    def number(self) -> int:
        return 3

    @property
    def broken(self) -> Any:
        raise ValueError("no adder today")

    partial = functools.partialmethod(lambda self, a, b: a - b, 10)

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def cached(self, value: int) -> int:
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("get_"):
            return lambda: name.removeprefix("get_")
        raise AttributeError(name)


async def test_methods_that_are_found_out_at_the_call() -> None:
    async with running(Computed) as replica:
        me = threading.current_thread().name
        assert await replica.call("show", 3) == "int 3"
        assert await replica.call("show", "x") == "object on qserve-Computed_0"
        assert await replica.call("wait", "x") == me
        assert [await replica.call("model", 4), await replica.call("model", 5)] == [8, 10]
        assert replica.code._instance.made == ["qserve-Computed_0"]
        assert await replica.call("adder", 1, 2) == 3
        assert await replica.call("partial", 4) == 6
        assert await replica.call("cached", 4) == 4
        assert await replica.call("get_color") == "color"
        with pytest.raises(MethodNotFound, match="'number'"):
            await replica.call("number")
        with pytest.raises(MethodNotFound, match="'color'"):
            await replica.call("color")
        with pytest.raises(ValueError, match="no adder today"):
            await replica.call("broken")


async def test_generators_are_collected() -> None:
    class Streams:
        def numbers(self) -> Iterator[int]:
            yield from range(3)

        async def async_numbers(self) -> AsyncIterator[int]:
            for number in range(3):
                yield number

        async def returned(self) -> Iterator[int]:
            return (number for number in range(3))

        def __call__(self) -> Iterator[str]:
            yield from "abc"

    async with running(Streams) as replica:
        for name in ("numbers", "async_numbers", "returned"):
            assert await replica.call(name) == [0, 1, 2]
        assert (await replica.get()).text == "abc"


async def test_a_sync_function_may_return_a_coroutine() -> None:
    async def inner() -> str:
        return "awaited"

    def outer() -> Any:
        return inner()

    async with running(outer) as replica:
        assert await replica.call() == "awaited"


@pytest.mark.parametrize("error", [StopIteration, SystemExit, KeyboardInterrupt])
async def test_exceptions_that_would_stop_the_loop_fail_their_call_only(error: type[BaseException]) -> None:
    def sync() -> None:
        raise error

    async def coroutine() -> None:
        raise error

    for function in (sync, coroutine):
        async with running(function) as replica:
            with pytest.raises(RuntimeError, match=error.__name__):
                await asyncio.wait_for(replica.call(), timeout=patience(10))


# Requests


async def test_call_gets_a_starlette_request() -> None:
    async def echo(request: Request) -> dict[str, Any]:
        assert type(request) is Request
        return {
            "method": request.method,
            "query": dict(request.query_params),
            "header": request.headers["x-test"],
            "json": await request.json(),
            "path": request.url.path,
            "root_path": request.scope["root_path"],
        }

    async with running(echo) as replica:
        answer = await replica.request("PUT", "/below?a=1", headers={"x-test": "yes"}, json=[1])
        assert answer.json() == {
            "method": "PUT",
            "query": {"a": "1"},
            "header": "yes",
            "json": [1],
            "path": "/echo/below",
            "root_path": "/echo",
        }


async def test_a_large_body_arrives_byte_by_byte() -> None:
    async def size(request: Request) -> bytes:
        return await request.body()

    body = bytes(range(256)) * 2600
    async with running(size) as replica:
        assert (await replica.request("POST", body=body)).body == body


async def test_the_client_counts_as_connected_while_its_request_runs() -> None:
    async def look(request: Request) -> dict[str, bool]:
        await request.body()
        return {"disconnected": await request.is_disconnected()}

    async with running(look) as replica:
        assert (await replica.get()).json() == {"disconnected": False}


async def test_a_callable_without_parameters_gets_no_request() -> None:
    def function() -> str:
        return "function"

    async def coroutine() -> str:
        return "coroutine"

    class Sync:
        def __call__(self) -> str:
            return "sync"

    class Async:
        async def __init__(self) -> None: ...  # type: ignore[misc]

        async def __call__(self) -> str:
            return "async"

    for code, text in ((function, "function"), (coroutine, "coroutine"), (Sync, "sync"), (Async, "async")):
        async with running(code) as replica:
            assert (await replica.get()).text == text


async def test_the_method_header_reaches_public_methods() -> None:
    class Several:
        def __init__(self) -> None:
            self.model = lambda request: "an attribute"

        def __call__(self, request: Request) -> str:
            return "call"

        def method(self, request: Request) -> str:
            return "method"

        def _private(self) -> str:
            return "private"

    def header(name: str) -> dict[str, str]:
        return {"x-serve-call-method": name}

    async with running(Several) as replica:
        assert (await replica.get()).text == "call"
        assert (await replica.get(headers=header("method"))).text == "method"
        for name in ("_private", "__init__", "model", "nope"):
            with pytest.raises(MethodNotFound):
                await replica.get(headers=header(name))
    async with running(Several, http_method_header=False) as replica:
        assert (await replica.get(headers=header("method"))).text == "call"


# Responses


class Model(pydantic.BaseModel):
    number: int


@dataclasses.dataclass
class Point:
    x: int


@pytest.mark.parametrize(
    ("result", "content_type", "body"),
    [
        ("text", "text/plain; charset=utf-8", b"text"),
        ("h\u00e9", "text/plain; charset=utf-8", "h\u00e9".encode()),
        (b"bytes", "text/plain", b"bytes"),
        (np.bytes_(b"bytes"), "text/plain", b"bytes"),
        (None, "text/plain", b""),
        ({"a": [1, 2.5, None, True]}, "application/json", None),
        ([], "application/json", b"[]"),
        (3, "application/json", b"3"),
    ],
)
async def test_results_become_responses(result: Any, content_type: str, body: bytes | None) -> None:
    async def give() -> Any:
        return result

    async with running(give) as replica:
        answer = await replica.get()
        assert (answer.status, answer.header("content-type")) == (200, content_type)
        assert answer.header("content-length") == str(len(answer.body))
        assert type(answer.body) is bytes  # else it cannot be sent
        if body is not None:
            assert answer.body == body
        else:
            assert answer.json() == result


async def test_json_is_indented_by_two() -> None:
    async def give() -> Any:
        return {"a": [1, {"b": "c: d, [e]"}], "empty": {}}

    async with running(give) as replica:
        text = (await replica.get()).text
    assert text == '{\n  "a": [\n    1,\n    {\n      "b": "c: d, [e]"\n    }\n  ],\n  "empty": {}\n}'


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"bytes", "bytes"),
        (Model(number=1), {"number": 1}),
        (ValueError("text"), "text"),
        (np.array([[1.5, 2.5]]), [[1.5, 2.5]]),
        (np.array([1, 2], dtype=np.uint8), [1, 2]),
        (np.float64(0.5), 0.5),
        (np.int32(4), 4),
        (np.bool_(True), True),
        (Point(1), {"x": 1}),
        ({1, 2}, [1, 2]),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (UUID(int=1), str(UUID(int=1))),
        ([Model(number=1), {"deep": np.float32(1)}], [{"number": 1}, {"deep": 1.0}]),
    ],
)
async def test_json_takes_more_than_json_types(value: Any, expected: Any) -> None:
    async def give() -> Any:
        return {"value": value}

    async with running(give) as replica:
        assert (await replica.get()).json() == {"value": expected}


async def test_what_json_has_no_word_for_is_null() -> None:
    """As pydantic and JavaScript write it: a browser cannot read Python's NaN."""

    async def give() -> Any:
        return {"value": [float("nan"), -float("inf"), np.float32("nan")], "text": "NaN"}

    async with running(give) as replica:
        assert msgspec.json.decode((await replica.get()).text) == {"value": [None, None, None], "text": "NaN"}


async def test_a_result_that_is_no_response_says_what_it_was() -> None:
    async def give() -> Any:
        return {"deep": [threading.Lock()]}

    async with running(give) as replica:
        with pytest.raises(ResultNotSerializable, match=r"returned a dict.*lock"):
            await replica.get()


@pytest.mark.parametrize("value", [np.longdouble(1), np.ones(2, np.longdouble)])
async def test_numbers_that_python_has_no_type_for_are_named(value: object) -> None:
    async def give() -> Any:
        return [value]

    async with running(give) as replica:
        with pytest.raises(ResultNotSerializable, match=r"numpy\.longdouble is not JSON serializable"):
            await replica.get()


@pytest.mark.parametrize(
    ("response", "media_type", "body"),
    [
        (lambda: Response("x", status_code=418, media_type="text/x"), "text/x; charset=utf-8", b"x"),
        (lambda: HTMLResponse("<p>", status_code=418), "text/html; charset=utf-8", b"<p>"),
        (lambda: JSONResponse({"a": 1}, status_code=418), "application/json", b'{"a":1}'),
        (lambda: StreamingResponse(iter("123"), status_code=418, media_type="text/x"), "text/x; charset=utf-8", b"123"),
    ],
)
async def test_starlette_responses_go_as_they_are(response: Any, media_type: str, body: bytes) -> None:
    async def give() -> Any:
        return response()

    async with running(give) as replica:
        answer = await replica.get()
        assert (answer.status, answer.header("content-type"), answer.body) == (418, media_type, body)


async def test_redirects_and_cookies_keep_their_headers() -> None:
    async def give() -> Response:
        response = RedirectResponse("/elsewhere")
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        return response

    async with running(give) as replica:
        answer = await replica.get()
        assert (answer.status, answer.header("location")) == (307, "/elsewhere")
        assert len([value for name, value in answer.headers if name == "set-cookie"]) == 2


async def test_the_background_task_of_a_response_is_done_first() -> None:
    done: list[str] = []

    async def give() -> Response:
        return Response("x", background=BackgroundTask(done.append, "done"))

    async with running(give) as replica:
        await replica.get()
        assert done == ["done"]


async def test_an_exception_is_raised_and_an_http_exception_is_a_response() -> None:
    async def fail() -> None:
        raise ZeroDivisionError("user code")

    async def refuse() -> None:
        raise HTTPException(418, "short and stout", headers={"X-Pot": "tea"})

    async with running(fail) as replica:
        with pytest.raises(ZeroDivisionError):
            await replica.get()
    async with running(refuse) as replica:
        answer = await replica.get()
        assert (answer.status, answer.text, answer.header("x-pot")) == (418, "short and stout", "tea")


@pytest.mark.parametrize(
    ("raised", "kind", "body"),
    [
        (HTTPException(404, "no such thing"), "text/plain; charset=utf-8", b"no such thing"),
        (FastAPIException(422, {"code": 7, "why": [None]}), "application/json", b'{"detail":{"code":7,"why":[null]}}'),
        (FastAPIException(422, [datetime.date(2026, 1, 2)]), "application/json", b'{"detail":["2026-01-02"]}'),
        (FastAPIException(422, 0), "application/json", b'{"detail":0}'),
        (HTTPException(204), None, b""),
        (HTTPException(304, "as before", headers={"etag": "a"}), None, b""),
    ],
)
async def test_an_http_exception_is_text_or_as_fastapi_shows_it(
    raised: HTTPException, kind: str | None, body: bytes
) -> None:
    async def refuse() -> None:
        raise raised

    async def refuse_to_stream() -> Any:
        raise raised
        yield "never"

    def refuse_to_stream_on_a_thread() -> Any:
        raise raised
        yield "never"

    for code in (refuse, refuse_to_stream, refuse_to_stream_on_a_thread):
        async with running(code) as replica:
            answer = await replica.get()
            headers = dict(answer.headers)
            assert (answer.status, headers.get("content-type"), answer.body) == (raised.status_code, kind, body)
            assert headers.get("content-length") == (str(len(body)) if kind else None)


# Context


async def test_the_context_is_there_in_the_constructor_and_in_calls() -> None:
    class Asks:
        def __init__(self) -> None:
            self.context = get_replica_context()

        def __call__(self) -> list[Any]:
            now = get_replica_context()
            is_self = now.servable_object is self and self.context == now
            return [now.deployment, now.replica_tag, is_self, now.request_id, now.attempt]

    async with running(Asks, name="Asked") as replica:
        assert await replica.call() == ["Asked", "Asked#1", True, None, 1]
        token = current_call.set(CallInfo("call-7", attempt=2))
        assert await replica.call() == ["Asked", "Asked#1", True, "call-7", 2]
        current_call.reset(token)


def test_outside_a_replica_there_is_no_context() -> None:
    with pytest.raises(QServeError, match="may only be called from within a replica"):
        get_replica_context()


# The end


@pytest.mark.parametrize("is_async", [False, True])
async def test_the_destructor_runs_exactly_once(is_async: bool) -> None:
    calls = []

    class Sync:
        def __del__(self) -> None:
            calls.append("sync")

    class Async:
        async def __del__(self) -> None:
            await asyncio.sleep(0)
            calls.append("async")

    async with running(Async if is_async else Sync) as replica:
        assert calls == []
    del replica
    gc.collect()
    assert calls == ["async" if is_async else "sync"]


async def test_a_destructor_that_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Raises:
        def __del__(self) -> None:
            raise ZeroDivisionError("at the end")

    with caplog.at_level(logging.ERROR):
        async with running(Raises):
            pass
    assert "Exception in __del__ of deployment 'Raises'" in caplog.text


async def test_an_instance_that_has_not_come_into_being_has_no_destructor(caplog: pytest.LogCaptureFixture) -> None:
    class Abstract(ABC):
        @abstractmethod
        def call(self) -> None: ...

    code = UserCode(deployment(Abstract).to_spec(CODEC), Abstract, "Abstract#1", CODEC)
    with pytest.raises(TypeError, match="abstract"):
        await code.construct()
    await code.close()

    assert not caplog.records


# Health


async def test_what_counts_as_a_health_check() -> None:
    class Base:
        async def check_health(self) -> None: ...

    class Inherits(Base): ...

    class Static:
        @staticmethod
        def check_health() -> None: ...

    class ForCallers:
        def check_health(self, request: object) -> str:
            return "fine"

    class Anything:
        def __getattr__(self, name: str) -> object:
            return lambda *_: 1 / 0

    class Without: ...

    async def has(cls: type) -> bool:
        async with running(cls) as replica:
            return replica.code.has_health_check

    assert [await has(cls) for cls in (Base, Inherits, Static)] == [True] * 3
    assert [await has(cls) for cls in (ForCallers, Anything, Without)] == [False] * 3


async def test_a_def_check_runs_on_the_thread_of_the_methods_and_what_it_raises_arrives() -> None:
    class Ill:
        def check_health(self) -> None:
            self.ran_on = threading.get_ident()
            raise SystemExit("ill")

        def thread(self) -> tuple[int, int]:
            return self.ran_on, threading.get_ident()

    begun: list[bool] = []
    async with running(Ill) as replica:
        with pytest.raises(RuntimeError, match=r"SystemExit\(ill\)"):
            await replica.code.check_health(lambda: begun.append(True))
        checked, called = await replica.call("thread")
    assert checked == called
    assert begun == [True]
