"""How long connections live, how many there may be, and who may open a WebSocket."""

import asyncio
import gzip
import signal
import socket
import ssl
import statistics
import subprocess
import time
from pathlib import Path

import pytest

from qserve.testing import TestInstance
from tests.instance.front_door.cases import calls_of, chunked, get, handshake, post
from tests.support.gates import Gate
from tests.support.gateways import gateway
from tests.support.raw_http import Address, ask, read_response, statuses
from tests.support.slowness import patience
from tests.support.waiting import until, wait_until

# Keep-alive


def test_a_connection_serves_one_request_after_the_other(door: Address) -> None:
    with door.connect() as connection:
        for number in range(20):
            connection.sendall(get(target=b"/%d" % number) if number % 2 else post(b"Content-Length: 2", rest=b"ab"))
            status, headers, _ = read_response(connection)
            assert status == 200
            assert b"connection" not in headers


@pytest.mark.parametrize("request_", [get(b"Connection: close"), b"GET /a HTTP/1.0\r\nHost: x\r\n\r\n"])
def test_it_ends_after_a_response_where_the_client_wants_that(door: Address, request_: bytes) -> None:
    answer = door.ask(request_)
    assert statuses(answer) == [200]
    assert b"connection: close" in answer


@pytest.mark.parametrize("first", [b"", get()])
def test_an_idle_connection_ends_without_a_word(door: Address, first: bytes) -> None:
    with door.connect() as connection:
        if first:
            connection.sendall(first)
            read_response(connection)
        began = time.monotonic()
        assert connection.recv(1) == b""
        assert 0.5 < time.monotonic() - began < patience(2.5)  # keep-alive of 1 s, looked at twice a second


# Deadlines


@pytest.mark.parametrize(
    "sent",
    [
        b"G",
        b"GET /a HTTP/1.1\r\nHost: x\r\n",
        b"GET /a HTTP/1.1\r\nHost: x\r\nA",
        post(b"Content-Length: 10000", rest=b"ab"),
        chunked(b"5\r\nab"),
        chunked(b"2\r\nab\r\n"),
        chunked(b"0\r\nA: "),
        post(b"Content-Length: 5"),
    ],
)
def test_a_request_that_stops_half_way_is_408(door: Address, sent: bytes) -> None:
    began = time.monotonic()
    answer = door.ask(sent)
    assert statuses(answer) == [408]
    assert b"connection: close" in answer
    assert 0.3 < time.monotonic() - began < patience(2.5)


def test_a_body_that_trickles_is_408_although_it_never_pauses(impatient: TestInstance) -> None:
    with gateway(impatient.settings, QSERVE_HTTP_BODY_TIMEOUT_S=1) as slow, slow.address.connect() as connection:
        connection.sendall(post(b"Content-Length: 100000"))
        began = time.monotonic()
        connection.settimeout(0.1)
        answer = b""
        while not answer and time.monotonic() - began < patience(5):
            connection.sendall(b"a")
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                continue
        assert statuses(answer) == [408]
        assert 0.7 < time.monotonic() - began < patience(3)


def test_a_steady_body_may_take_longer_than_its_deadline(impatient: TestInstance) -> None:
    most_s = patience(0.6)
    with (
        gateway(impatient.settings, QSERVE_HTTP_BODY_TIMEOUT_S=most_s) as strict,
        strict.address.connect() as connection,
    ):
        connection.sendall(post(b"Content-Length: 20000"))
        for _ in range(20):
            connection.sendall(bytes(1000))
            time.sleep(most_s / 6)
        assert read_response(connection)[0] == 200


def test_a_request_that_came_while_the_gateway_stood_still_is_answered(impatient: TestInstance) -> None:
    idle_s = patience(0.5)
    with (
        gateway(impatient.settings, QSERVE_HTTP_KEEP_ALIVE_S=idle_s) as served,
        served.address.connect() as connection,
    ):
        connection.sendall(get())
        assert read_response(connection)[0] == 200
        served.process.send_signal(signal.SIGSTOP)
        connection.sendall(get())
        time.sleep(idle_s + 0.6)
        served.process.send_signal(signal.SIGCONT)
        assert read_response(connection)[0] == 200


def test_a_slow_response_is_no_slow_client(door: Address) -> None:
    with door.connect() as connection:
        connection.sendall(get(target=b"/slow"))
        assert read_response(connection)[2] == b"done"


# Sizes


@pytest.mark.parametrize(
    "data",
    [
        post(b"Content-Length: 2000001"),
        post(b"Content-Length: 10000000000", rest=b"ab"),
        post(b"Content-Length: 3000000", rest=bytes(3_000_000)),
        post(b"Content-Type: multipart/form-data; boundary=b", b"Content-Length: 3000000", rest=b"--b\r\n"),
        chunked(b"40000\r\n" + bytes(0x40000) + b"\r\n" + (b"100000\r\n" + bytes(0x100000) + b"\r\n") * 3),
    ],
    ids=["announced", "announced 10 GB", "sent", "multipart", "chunked"],
)
def test_a_body_over_the_limit_is_413_and_the_answer_arrives(door: Address, data: bytes) -> None:
    answer = door.ask(data)
    assert statuses(answer) == [413]
    assert b"QSERVE_MAX_BODY_BYTES" in answer


# Counting


def test_there_are_no_more_connections_than_allowed(impatient: TestInstance) -> None:
    with gateway(impatient.settings, QSERVE_HTTP_MAX_CONNECTIONS=3) as small:
        held = [small.address.connect() for _ in range(3)]
        for connection in held:
            connection.sendall(get())
            assert read_response(connection)[0] == 200
        assert statuses(small.address.ask(get())) == [503]
        for connection in held:
            connection.close()
        wait_until(lambda: statuses(small.address.ask(get(b"Connection: close"))) == [200], 5)


def test_one_address_has_no_more_connections_than_allowed(impatient: TestInstance) -> None:
    with gateway(impatient.settings, QSERVE_HTTP_MAX_CONNECTIONS_PER_IP=2) as small:
        held = [small.address.connect() for _ in range(2)]
        for connection in held:
            connection.sendall(get())
            assert read_response(connection)[0] == 200
        assert statuses(small.address.ask(b"")) == [429]
        held[0].sendall(get())
        assert read_response(held[0])[0] == 200
        for connection in held:
            connection.close()


@pytest.mark.timeout(90)
def test_five_hundred_trickling_connections_are_ended_and_do_not_slow_others(impatient: TestInstance) -> None:
    async def trickle(address: Address, begun: asyncio.Event) -> float:
        reader, writer = await asyncio.open_connection(address.host, address.port)
        began = time.monotonic()
        begun.set()
        ended = asyncio.ensure_future(reader.read())
        for byte in b"GET /a HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 100:
            writer.write(bytes([byte]))
            done, _ = await asyncio.wait({ended}, timeout=0.5)
            if done:
                break
        assert statuses(await ended) == [408]
        writer.close()
        return time.monotonic() - began

    async def latencies(address: Address, count: int) -> list[float]:
        reader, writer = await asyncio.open_connection(address.host, address.port)
        took = []
        for _ in range(count):
            began = time.monotonic()
            writer.write(get())
            head = await reader.readuntil(b"\r\n\r\n")
            assert statuses(head) == [200]
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            took.append(time.monotonic() - began)
        writer.close()
        return took

    async def run(address: Address) -> tuple[list[float], list[float], list[float]]:
        before = await latencies(address, 400)
        begun = [asyncio.Event() for _ in range(500)]
        trickling = [asyncio.ensure_future(trickle(address, each)) for each in begun]
        for each in begun:
            await each.wait()
        during = await latencies(address, 400)
        return before, during, await asyncio.gather(*trickling)

    with gateway(impatient.settings, QSERVE_HTTP_HEADER_TIMEOUT_S=10, QSERVE_HTTP_KEEP_ALIVE_S=5) as usual:
        before, during, lives = asyncio.run(run(usual.address))
    assert max(lives) < patience(12)
    # Loose, because machines that run tests are busy, and 500 clients of one process are work too.
    assert statistics.median(during) < statistics.median(before) * 3 + 0.002


# Compression


@pytest.mark.parametrize("coding", [b"gzip", b"br"])
def test_compressed_bodies_pass_as_they_are(door: Address, coding: bytes) -> None:
    with door.connect() as connection:
        connection.sendall(get(b"Accept-Encoding: " + coding, target=b"/zip"))
        status, headers, body = read_response(connection)
    assert (status, headers[b"content-encoding"], headers[b"vary"]) == (200, coding, b"accept-encoding")
    assert gzip.decompress(body) == b"hello"


# WebSockets


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (b"", True),
        (b"http://us.example:8000", True),
        (b"https://us.example:8000", True),
        (b"https://friend.example", True),
        (b"HTTP://other.example:8080", True),
        (b"http://us.example", False),
        (b"https://evil.example", False),
        (b"https://evil-friend.example", False),
        (b"https://friend.example.evil", False),
        (b"https://friend.example:444", False),
        (b"http://us.example:8000.evil", False),
        (b"null", False),
        (b"file://", False),
        (b"http://[", False),
    ],
)
def test_websockets_are_open_to_our_own_pages_and_those_listed(door: Address, origin: bytes, allowed: bool) -> None:
    lines = [b"Origin: " + origin] if origin else []
    with door.connect() as connection:
        connection.sendall(handshake(*lines, target=b"/ws/"))
        answer = connection.recv(65536)
    assert statuses(answer) == [101 if allowed else 403], answer
    assert (b"not open to pages of this origin" in answer) is not allowed, answer


# TLS


def test_https_is_served(impatient: TestInstance, certificate: Path) -> None:
    files = ("--ssl-certfile", str(certificate / "cert.pem"), "--ssl-keyfile", str(certificate / "key.pem"))
    context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
    with gateway(impatient.settings, *files) as secure:
        assert secure.ready["url"].startswith("https://")
        with secure.address.connect() as plain, context.wrap_socket(plain, server_hostname="localhost") as connection:
            for _ in range(3):
                connection.sendall(post(b"Content-Length: 300000", rest=bytes(300_000)))
                status, _, body = read_response(connection)
                assert (status, b'"body":300000' in body.replace(b" ", b"")) == (200, True)
            assert statuses(ask(connection, get(host=b""))) == [400]
        with secure.address.connect() as plain:
            assert b"200" not in ask(plain, get())


def test_a_connection_without_its_tls_handshake_ends_as_one_without_headers_does(
    impatient: TestInstance, certificate: Path
) -> None:
    files = ("--ssl-certfile", str(certificate / "cert.pem"), "--ssl-keyfile", str(certificate / "key.pem"))
    with (
        gateway(impatient.settings, *files, QSERVE_HTTP_HEADER_TIMEOUT_S=0.8) as secure,
        secure.address.connect(10) as connection,
    ):
        assert connection.recv(1) == b""


def test_a_certificate_that_cannot_be_used_is_told_in_one_line(impatient: TestInstance, tmp_path: Path) -> None:
    with gateway(impatient.settings, "--ssl-certfile", str(tmp_path / "none.pem")) as failed:
        assert "TLS certificate" in failed.ready["error"]
        assert failed.process.wait(patience(10)) == 1


# Leaving


@pytest.mark.timeout(90)
@pytest.mark.parametrize("keep_alive", [True, False])
def test_no_request_is_lost_when_one_of_two_gateways_leaves(impatient: TestInstance, keep_alive: bool) -> None:
    answered: list[bytes] = []

    async def client(address: Address, end: asyncio.Event) -> None:
        """Requests, each answered whole; a connection that the gateway wants to end is not used again."""
        while not end.is_set():
            reader, writer = await asyncio.open_connection(address.host, address.port)
            last = False
            while not last and not end.is_set():
                writer.write(get() if keep_alive else get(b"Connection: close"))
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                assert statuses(head.upper()) == [200]
                answered.append(await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])))
                last = b"connection: close" in head
            writer.close()

    async def run(address: Address, leave: "subprocess.Popen[bytes]") -> None:
        end = asyncio.Event()
        clients = [asyncio.ensure_future(client(address, end)) for _ in range(32)]
        await until(lambda: len(answered) > 400)
        leave.terminate()
        await asyncio.to_thread(leave.wait, patience(20))
        before = len(answered)
        await until(lambda: len(answered) > before + 400)
        end.set()
        await asyncio.gather(*clients)

    with gateway(impatient.settings, "--reuse-port") as first:
        shared = ("--reuse-port", "--port", str(first.ready["port"]))
        with gateway(impatient.settings, *shared):
            asyncio.run(run(first.address, first.process))
            assert first.process.returncode == 0


def test_an_idle_connection_ends_soon_when_the_gateway_leaves(impatient: TestInstance) -> None:
    with gateway(impatient.settings) as leaving, leaving.address.connect() as connection:
        connection.sendall(get())
        read_response(connection)
        leaving.process.terminate()
        began = time.monotonic()
        assert connection.recv(1) == b""
        assert time.monotonic() - began < patience(2)
        assert leaving.process.wait(patience(10)) == 0


@pytest.mark.parametrize("first", [get(), get(host=b"")], ids=["idle", "refused"])
def test_a_client_of_https_that_does_not_agree_to_the_end_holds_up_nobody(
    impatient: TestInstance, certificate: Path, first: bytes
) -> None:
    files = ("--ssl-certfile", str(certificate / "cert.pem"), "--ssl-keyfile", str(certificate / "key.pem"))
    context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
    with (
        gateway(impatient.settings, *files) as leaving,
        leaving.address.connect() as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(first)
        read_response(connection)
        began = time.monotonic()
        leaving.process.terminate()
        assert leaving.process.wait(patience(10)) == 0
        assert time.monotonic() - began < patience(5)


def test_a_request_in_flight_is_answered_when_the_gateway_leaves(
    impatient: TestInstance, gate: Gate, tmp_path: Path
) -> None:
    with gateway(impatient.settings) as leaving, leaving.address.connect(30) as connection:
        connection.sendall(get(target=b"/slow?gate=%b" % bytes(tmp_path / "gate")))
        wait_until(lambda: calls_of(impatient, "slow") == 1)
        leaving.process.terminate()
        wait_until(lambda: not listens(leaving.address))
        gate.open()
        status, headers, body = read_response(connection)
        assert (status, body) == (200, b"done")
        assert headers[b"connection"] == b"close"


def listens(address: Address) -> bool:
    """Whether new connections are taken."""
    try:
        socket.create_connection((address.host, address.port), timeout=patience(1)).close()
    except ConnectionError:
        return False
    return True
