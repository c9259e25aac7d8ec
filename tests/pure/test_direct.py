"""Requests that are answered without a task: byte for byte as those that are answered over ASGI."""

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import pytest
import uvicorn
from msgspec.structs import replace
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from qserve.errors import BackPressureError, GetTimeoutError, ReplicaDied
from qserve.hooks import GatewayHook, GatewayRequest
from qserve.settings import Settings
from qserve.wire.channel import ABORT, DATA, END, Chunk
from qserve.wire.messages import HTTP_RESPONSE, HttpResponse, Reply, encode
from qserve.wire.spec import DeploymentSpec, Target
from qserve_gateway.bodies.streaming import ClientDisconnected
from qserve_gateway.door.limits import SWEEP_S, Door
from qserve_gateway.door.protocol import LAST_CHANCE_S, HttpProtocol
from qserve_gateway.gateway import Gateway
from tests.pure.test_gateway_app import FakeCalls, outcome, user_error
from tests.support.waiting import until

GET = b"GET /hello?a=1 HTTP/1.1\r\nhost: x\r\nx-request-id: one\r\n\r\n"


HELLO = DeploymentSpec(name="hello", target=Target("module:name"), revision="1", route_prefix="/hello")


class Socket(asyncio.Transport):
    """What a client would see of a connection."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = asyncio.Event()
        self.reads = True
        self.real: socket.socket | None = None

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.closed.set()

    abort = close

    def is_closing(self) -> bool:
        return self.closed.is_set()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        known = {"peername": ("127.0.0.1", 5), "sockname": ("127.0.0.1", 80), "socket": self.real}
        return known.get(name, default)

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.closed.set()


class Connection:
    """A connection to a gateway, without a network."""

    def __init__(
        self, calls: FakeCalls, *, direct: bool = True, hooks: Sequence[GatewayHook] = (), **settings: Any
    ) -> None:
        self.gateway = gateway = Gateway(calls, Settings(**settings), hooks=hooks)
        gateway.use_deployments([HELLO])

        async def over_asgi(scope: Scope, receive: Receive, send: Send) -> None:
            await gateway(scope, receive, send)

        app = gateway if direct else over_asgi
        config = uvicorn.Config(
            cast(Any, app), lifespan="off", log_config=None, server_header=False, interface="asgi3", proxy_headers=False
        )
        config.load()
        self.state = ServerState()
        self.state.default_headers = [(b"server", b"test")]
        self.door = Door(Settings(), has_log=False)
        self.protocol = HttpProtocol(self.door, config=config, server_state=self.state, app_state={})
        self.socket = Socket()
        self.protocol.connection_made(self.socket)

    async def answered(self, request: bytes, responses: int = 1) -> bytes:
        """What is written for a request, once so many responses are complete."""
        self.protocol.data_received(request)
        await until(lambda: self.state.total_requests >= responses and not self.state.tasks)
        await asyncio.sleep(0)  # what is written in a tick leaves at its end
        return self.socket.written

    @property
    def tasks(self) -> int:
        return len(self.state.tasks)


@pytest.fixture
def calls() -> FakeCalls:
    return FakeCalls()


@pytest.mark.parametrize(
    "request_head",
    [
        GET,
        GET.replace(b"GET", b"HEAD"),
        GET.replace(b"GET", b"POST"),
        GET.replace(b"GET", b"DELETE"),
        GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"),
        GET.replace(b"\r\n\r\n", b"\r\nconnection: keep-alive, x-gone\r\nx-gone: 1\r\nx-kept: 1\r\n\r\n"),
        GET.replace(b"\r\n\r\n", b"\r\nconnection: host\r\n\r\n"),
        GET.replace(b"\r\n\r\n", b"\r\ncontent-length: 0\r\n\r\n"),
        GET.replace(b"\r\n\r\n", b"\r\nx-request-timeout-ms: 5\r\n\r\n"),
        GET.replace(b"\r\n\r\n", b"\r\nx-request-timeout-ms: soon\r\n\r\n"),
        GET.replace(b"\r\n\r\n", b"\r\nx-request-timeout-ms: 0\r\n\r\n"),
        GET.replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n"),
        GET.replace(b"1.1", b"1.0"),
        GET.replace(b"/hello", b"/nowhere"),
        GET.replace(b"/hello", b"/-/routes"),
        GET + GET,
    ],
)
async def test_a_request_gets_the_same_bytes_with_a_task_and_without(request_head: bytes) -> None:
    seen = []
    for direct in (True, False):
        calls = FakeCalls()
        connection = Connection(calls, direct=direct)
        written = await connection.answered(request_head, request_head.count(b"HTTP/1."))
        puts = [(put.deployment, put.timeout_s, put.safe, put.request) for put in calls.puts]
        seen.append((written, puts, connection.socket.is_closing(), connection.door.counts.latencies().keys()))

    assert seen[0] == seen[1]
    assert seen[0][0].startswith(b"HTTP/1.1 ")


@pytest.mark.parametrize("direct", [True, False])
async def test_calls_of_a_deployment_that_says_so_may_run_again(calls: FakeCalls, direct: bool) -> None:
    connection = Connection(calls, direct=direct)
    connection.gateway.use_deployments([replace(HELLO, idempotent=True)])
    await connection.answered(GET.replace(b"GET", b"POST"))
    assert calls.last.safe


@pytest.mark.parametrize(
    "answer",
    [
        HttpResponse(200, [(b"Content-Type", b"text/html"), (b"set-cookie", b"a"), (b"set-cookie", b"b")], b"x" * 5000),
        HttpResponse(201, [(b"connection", b"x-gone"), (b"x-gone", b"1"), (b"date", b"never")], b"text"),
        HttpResponse(200, [(b"content-length", b"7")], b"four"),
        HttpResponse(204, [(b"etag", b"1")], b"not sent"),
        HttpResponse(304, [(b"content-length", b"9")], b""),
        HttpResponse(200, [(b"x-request-id", b"of the user")], b""),
        HttpResponse(200, [(b"x\r\ny", b"1")], b""),
        HttpResponse(200, [(b"x", b"1\r\n\r\nHTTP/1.1")], b""),
        HttpResponse(99, [], b""),
        BackPressureError("full", retry_after=3),
        GetTimeoutError("late"),
        ReplicaDied("gone"),
        user_error("ZeroDivisionError", "division by zero"),
        b"5",
    ],
)
@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("debug", [False, True])
async def test_an_answer_gets_the_same_bytes_with_a_task_and_without(
    answer: Any, method: bytes, debug: bool, calls: FakeCalls
) -> None:
    calls.answer = lambda request: answer
    request = GET.replace(b"GET", method)

    direct, over_asgi = [
        await Connection(calls, direct=direct, debug=debug).answered(request) for direct in (True, False)
    ]

    assert direct == over_asgi


class Choosy(GatewayHook):
    """Wants requests with a query, and notes what it is told of them."""

    def __init__(self) -> None:
        self.asked = 0
        self.told: list[Any] = []

    def wants(self, scope: Mapping[str, Any]) -> bool:
        self.asked += 1
        return bool(scope["query_string"])

    def before(self, request: GatewayRequest) -> None:
        request.meta["seen"] = "yes"
        request.scope["state"]["traceresponse"] = "00-1-2-01"

    def after(self, request: GatewayRequest, state: Any, status: int) -> None:
        self.told.append(status)

    def error(self, request: GatewayRequest, state: Any, error: BaseException) -> None:
        self.told.append(type(error))


@pytest.mark.parametrize(("request_head", "told"), [(GET, [200]), (GET.replace(b"?a=1", b""), [])])
async def test_a_request_with_hooks_takes_no_task_either(
    calls: FakeCalls, request_head: bytes, told: list[Any]
) -> None:
    seen = []
    for direct in (True, False):
        hook = Choosy()
        connection = Connection(calls, direct=direct, hooks=[hook])
        connection.protocol.data_received(request_head)
        assert connection.tasks == (not direct)
        written = await connection.answered(b"")
        seen.append((written, hook.asked, hook.told, calls.last.meta))

    assert seen[0] == seen[1]
    assert seen[0][1:3] == (1, told)
    assert (b"\r\ntraceresponse: 00-1-2-01\r\n" in seen[0][0]) == bool(told)


def begin_stream(calls: FakeCalls) -> Callable[[Chunk], None]:
    """Answer the call that was put last with the beginning of a stream; returns what takes its further chunks."""
    pending = calls.last_put
    channel = calls.open_channel(pending)
    assert pending.on_stream is not None
    channel.feed(Chunk("replica", DATA, 0, encode(HttpResponse(200, [(b"x-part", b"1")], b""))))
    pending.on_stream(pending, channel)
    return channel.feed


class Hooked(NamedTuple):
    """A request that waits for its answer, and what its hook is told."""

    connection: Connection
    hook: Choosy


def begin_hooked(calls: FakeCalls) -> Hooked:
    """A request with a hook that has been put, and has no answer yet."""
    calls.answer = lambda request: None
    hook = Choosy()
    connection = Connection(calls, hooks=[hook])
    connection.protocol.data_received(GET)
    return Hooked(connection, hook)


async def test_hooks_are_told_that_a_client_has_left(calls: FakeCalls) -> None:
    hooked = begin_hooked(calls)
    hooked.connection.protocol.connection_lost(None)
    assert hooked.hook.told == [ClientDisconnected]
    calls.last_put.on_outcome(outcome(HttpResponse(200, [], b"late")))
    assert hooked.hook.told == [ClientDisconnected]


async def test_hooks_are_told_what_a_gateway_that_stops_has_answered(calls: FakeCalls) -> None:
    hooked = begin_hooked(calls)
    hooked.connection.protocol.shutdown()
    hooked.connection.protocol.give_up()
    hooked.connection.protocol.connection_lost(None)
    assert hooked.hook.told == [503]


async def test_hooks_are_told_of_a_response_once_its_slow_client_has_read_it(calls: FakeCalls) -> None:
    hooked = begin_hooked(calls)
    protocol = hooked.connection.protocol
    protocol.pause_writing()
    calls.last_put.on_outcome(outcome(HttpResponse(201, [], b"done")))
    await asyncio.sleep(0)
    assert hooked.hook.told == []
    protocol.resume_writing()
    written = await hooked.connection.answered(b"")
    assert hooked.hook.told == [201]
    assert written.count(b"traceresponse") == 1


async def test_hooks_are_told_of_an_answer_that_cannot_be_sent(calls: FakeCalls) -> None:
    hooked = begin_hooked(calls)
    calls.last_put.on_outcome(outcome(HttpResponse(99, [], b"")))
    assert (await hooked.connection.answered(b"")).startswith(b"HTTP/1.1 500 ")
    assert hooked.hook.told == [500]


async def test_hooks_are_told_how_a_stream_has_ended(calls: FakeCalls) -> None:
    hooked = begin_hooked(calls)
    feed = begin_stream(calls)
    assert hooked.hook.told == []
    feed(Chunk("replica", END, 1, b""))
    assert b"\r\ntraceresponse: 00-1-2-01\r\n" in await hooked.connection.answered(b"")
    assert hooked.hook.told == [200]


async def test_a_response_takes_no_task(calls: FakeCalls) -> None:
    calls.answer = lambda request: None
    connection = Connection(calls)

    connection.protocol.data_received(GET)
    assert (connection.tasks, len(calls.puts)) == (0, 1)
    calls.last_put.on_outcome(outcome(HttpResponse(200, [], b"done")))
    await asyncio.sleep(0)

    assert connection.socket.written.endswith(b"\r\n\r\ndone")
    assert connection.tasks == 0


@pytest.mark.parametrize("reply", [Reply("id", "me", HTTP_RESPONSE, b"\xc1"), Reply("id", "me", 99, b"")])
async def test_a_reply_that_makes_no_sense_gets_the_same_bytes_with_a_task_and_without(reply: Reply) -> None:
    seen = []
    for direct in (True, False):
        calls = FakeCalls()
        calls.answer = lambda request: None
        connection = Connection(calls, direct=direct)
        connection.protocol.data_received(GET)
        await calls.arrived.wait()
        calls.last_put.on_outcome(reply)
        seen.append(await connection.answered(b""))

    assert seen[0] == seen[1]
    assert seen[0].startswith(b"HTTP/1.1 50")


@pytest.mark.parametrize("request_head", [GET, GET.replace(b"?a=1", b"")])
async def test_a_call_that_cannot_be_prepared_gets_the_same_bytes_with_a_task_and_without(request_head: bytes) -> None:
    class Failing(FakeCalls):
        def prepare(self, *_: Any, **__: Any) -> Any:
            raise OverflowError("cannot convert float infinity to integer")

    seen = []
    for direct in (True, False):
        hook = Choosy()
        seen.append((await Connection(Failing(), direct=direct, hooks=[hook]).answered(request_head), hook.told))

    assert seen[0] == seen[1]
    assert seen[0][0].startswith(b"HTTP/1.1 500 ")


async def test_a_client_that_leaves_withdraws_its_call_at_once(calls: FakeCalls) -> None:
    calls.answer = lambda request: None
    connection = Connection(calls)
    connection.protocol.data_received(GET)

    connection.protocol.connection_lost(None)

    assert calls.cancelled == ["call0"]
    assert connection.socket.written == b""
    assert connection.door.counts.series["hello", 4].count == 1


async def test_a_call_may_outlive_its_client(calls: FakeCalls) -> None:
    calls.answer = lambda request: None
    connection = Connection(calls)
    connection.protocol.data_received(GET.replace(b"host: x", b"host: x\r\nx-request-disconnect-disabled: ?1"))

    connection.protocol.connection_lost(None)
    calls.last_put.on_outcome(Reply("id", "me", 99, b""))

    assert calls.cancelled == []
    assert connection.socket.written == b""


@pytest.mark.parametrize(("method", "status"), [(b"GET", b"503"), (b"POST", b"502")])
async def test_a_gateway_that_stops_waits_no_longer_and_says_whether_the_request_may_be_sent_again(
    calls: FakeCalls, method: bytes, status: bytes
) -> None:
    calls.answer = lambda request: None
    connection = Connection(calls)
    connection.protocol.data_received(GET.replace(b"GET", method))

    connection.protocol.shutdown()
    connection.protocol.give_up()

    assert calls.cancelled == ["call0"]
    assert connection.socket.written.startswith(b"HTTP/1.1 %b " % status)
    assert (b"\r\nretry-after: 1\r\n" in connection.socket.written) is (method == b"GET")
    assert (b"the call may have run" in connection.socket.written) is (method == b"POST")
    assert b"\r\nconnection: close\r\n" in connection.socket.written
    assert connection.socket.is_closing()


async def test_the_response_to_a_request_in_flight_is_the_last_one_of_a_gateway_that_stops(calls: FakeCalls) -> None:
    calls.answer = lambda request: None
    connection = Connection(calls)
    connection.protocol.data_received(GET)

    connection.protocol.shutdown()
    calls.last_put.on_outcome(outcome(HttpResponse(200, [], b"done")))

    assert b"\r\nconnection: close\r\n" in connection.socket.written
    assert connection.socket.is_closing()


async def test_a_client_that_reads_slowly_gets_its_response_when_it_reads(calls: FakeCalls) -> None:
    calls.answer = lambda request: None
    connection = Connection(calls)
    connection.protocol.data_received(GET)
    connection.protocol.pause_writing()

    calls.last_put.on_outcome(outcome(HttpResponse(200, [], b"done")))
    await asyncio.sleep(0)
    assert (connection.tasks, connection.socket.written) == (1, b"")
    connection.protocol.resume_writing()

    assert (await connection.answered(b"")).endswith(b"done")


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_stream_goes_on_in_a_task(calls: FakeCalls, leaves: bool) -> None:
    calls.answer = lambda request: None
    connection = Connection(calls)
    connection.protocol.data_received(GET)
    feed = begin_stream(calls)
    assert connection.tasks == 1
    if leaves:
        connection.protocol.connection_lost(None)
    else:
        feed(Chunk("replica", END, 1, b""))
    await until(lambda: not connection.tasks)

    assert calls.cancelled == ["call0"]  # as every stream's, which has no effect where it has ended


async def test_a_stream_that_breaks_off_has_not_failed_because_of_its_client(calls: FakeCalls) -> None:
    calls.answer = lambda request: None
    connection = Connection(calls)
    connection.protocol.data_received(GET)
    feed = begin_stream(calls)
    feed(Chunk("replica", ABORT, 1, b"the replica is gone"))
    await connection.socket.closed.wait()
    connection.protocol.connection_lost(None)

    counts = connection.door.counts.series
    assert {key: series.count for key, series in counts.items()} == {("hello", 5): 1}


async def test_a_client_that_leaves_after_a_stream_has_left_all_the_same(calls: FakeCalls) -> None:
    calls.answer = lambda request: None
    connection = Connection(calls)
    connection.protocol.data_received(GET)
    begin_stream(calls)(Chunk("replica", END, 1, b""))
    await connection.answered(GET)
    connection.protocol.connection_lost(None)

    counts = connection.door.counts.series
    assert {key: series.count for key, series in counts.items()} == {("hello", 2): 1, ("hello", 4): 1}


async def test_the_rest_of_a_large_body_is_read_past_the_parser_and_what_follows_it_waits(calls: FakeCalls) -> None:
    connection = Connection(calls)
    protocol, body = connection.protocol, bytes(range(256)) * 1200
    head = GET.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\ncontent-length: %d\r\n\r\n" % len(body))
    protocol.data_received(head + body[:100_000])
    assert not connection.socket.reads, "the application has to take what is there first"
    assert protocol.divert(memoryview(bytearray(len(body) - 100_000))) is None
    assert protocol.cycle.body == body[:100_000]
    protocol.cycle.body = bytearray()

    assert protocol.divert(memoryview(bytearray(10))) is None, "not the size of the rest"
    rest = bytearray(len(body) - 100_000)
    reader = protocol.divert(memoryview(rest))
    assert reader is not None
    assert vars(connection.socket)["protocol"] is reader
    while not reader.over.done():
        place = reader.get_buffer(-1)[:70_000]
        place[:] = body[100_000 + reader.size :][: len(place)]
        reader.buffer_updated(len(place))

    assert rest == body[100_000:]
    assert vars(connection.socket)["protocol"] is protocol
    assert (protocol.cycle.more_body, connection.socket.reads) == (False, True)
    protocol.data_received(GET)
    assert not connection.socket.reads, "a request that waits for its turn is enough"
    for task in connection.state.tasks:
        task.cancel()


async def test_an_idle_client_has_its_last_chance_however_old_the_clock_of_the_door_is(calls: FakeCalls) -> None:
    connection = Connection(calls)
    now = asyncio.get_running_loop().time()
    connection.door.now = now - SWEEP_S

    connection.protocol.shutdown()

    connection.protocol.look(now + LAST_CHANCE_S / 2)
    assert not connection.socket.is_closing()
    connection.protocol.look(now + LAST_CHANCE_S + 1)
    assert connection.socket.is_closing()
