"""Requests that come before the response to an earlier one: they wait, and their client is watched."""

import asyncio
import re
import socket

import pytest

from qserve.wire.messages import HttpRequest, HttpResponse
from tests.pure.test_direct import GET, Connection
from tests.pure.test_gateway_app import FakeCalls, outcome

MANY = 5000


@pytest.fixture
def calls() -> FakeCalls:
    """Answers one request after the other, when it is told to."""
    made = FakeCalls()
    made.answer = lambda request: None
    return made


def numbered(count: int) -> bytes:
    return b"".join(GET.replace(b": one", b": %05d" % number) for number in range(count))


def ids_in(written: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"x-request-id: (\d+)", written)]


async def test_those_that_wait_are_not_parsed(calls: FakeCalls) -> None:
    connection = Connection(calls)
    for _ in range(3):
        connection.protocol.data_received(numbered(MANY))
    assert len(connection.protocol.pipeline) < 10
    assert not connection.socket.reads


async def test_each_is_answered_in_its_turn(calls: FakeCalls) -> None:
    connection = Connection(calls)
    sent = numbered(MANY) + b"GET /hello HTTP/1.1\r\nhost: x\r\nx-request-id: %05d\r\n" % MANY
    connection.protocol.data_received(sent[:100])
    connection.protocol.data_received(sent[100:10_001])
    connection.protocol.flow.resume_reading()  # as an application does that waits for its client to leave
    connection.protocol.data_received(sent[10_001:-7])
    for _ in range(MANY):
        calls.last_put.on_outcome(outcome(HttpResponse(200, [], b"done")))
    await asyncio.sleep(0)
    assert ids_in(connection.socket.written) == list(range(MANY))

    assert connection.socket.reads
    connection.protocol.data_received(sent[-7:] + b"\r\n")
    calls.last_put.on_outcome(outcome(HttpResponse(200, [], b"done")))
    assert ids_in(connection.socket.written)[-1] == MANY


@pytest.mark.parametrize("direct", [True, False])
async def test_those_answered_in_tasks_and_with_bodies_are_not_lost(direct: bool) -> None:
    calls = FakeCalls()
    connection = Connection(calls, direct=direct)
    post = GET.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\ncontent-length: 3\r\n\r\nabc")
    seen: list[bytes] = []

    def answer(request: HttpRequest) -> HttpResponse:
        seen.append(request.body)
        return HttpResponse(200, [], b"done")

    calls.answer = answer
    written = await connection.answered((GET + post) * 100, responses=200)
    assert written.count(b"HTTP/1.1 200 OK") == 200
    assert seen == [b"", b"abc"] * 100
    assert connection.socket.reads


async def test_a_client_that_leaves_behind_some_is_noticed(calls: FakeCalls) -> None:
    connection = Connection(calls)
    client, connection.socket.real = socket.socketpair()
    with client, connection.socket.real:
        client.sendall(b"not read")
        connection.protocol.data_received(GET + GET)
        connection.protocol.look(connection.door.now)
        assert not connection.socket.is_closing()
        assert not connection.socket.reads

        client.close()
        connection.protocol.look(connection.door.now)
        assert connection.socket.is_closing()
    connection.protocol.connection_lost(None)
    assert calls.cancelled == ["call0"]
