"""The connection that carries calls: order, loss, and what it refuses to connect to."""

import asyncio
import contextlib
import itertools
import re
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest
import redis
import uvloop
from redis.exceptions import RedisError

from qserve.broker.connection import Answer, Connection
from qserve.broker.instance.state import State
from qserve.broker.keys import Keys
from qserve.broker.link import Link
from qserve.broker.scripts import Script
from qserve.broker.server import embedded, redis_clients
from qserve.broker.server.address import Broker
from qserve.errors import BrokerUnavailable, ConfigurationError
from qserve.wire.messages import Signer
from qserve.wire.spec import HttpSettings
from tests.support.chosen_server import needs_one_server
from tests.support.faulty_link import FaultyLink
from tests.support.servers import wait_until_accepting
from tests.support.serving import free_port
from tests.support.slowness import patience
from tests.support.waiting import until, wait_until


@pytest.fixture
async def connection(redis_server: str, redis_client: "redis.Redis") -> AsyncIterator[Connection]:
    """A connection to an empty server."""
    connection = await Connection.open(redis_server)
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def guarded_server() -> Iterator[int]:
    """Port of a server with a password and a user of few rights."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "valkey.conf"
        config.write_text(f"""port {port}\ndir {folder}\nsave ""\nrequirepass se/cret
            user guest on >guest ~* +ping +select\nlogfile {folder}/log""")
        server = subprocess.Popen([str(embedded.find_server()), str(config)])
        try:
            wait_until(partial(listens, port))
            yield port
        finally:
            server.kill()
            server.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


PING, ROLE = b"*1\r\n$4\r\nPING\r\n", b"*1\r\n$4\r\nROLE\r\n"


class Peer(asyncio.Protocol):
    """A server that says what a test wants said."""

    def __init__(self) -> None:
        self.connected = asyncio.Event()
        self.received: list[bytes] = []
        self._greetings = [(PING, b"+PONG\r\n"), (ROLE, b"*3\r\n$6\r\nmaster\r\n:0\r\n*0\r\n")]
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.connected.set()

    def data_received(self, data: bytes) -> None:
        if self._greetings and data == self._greetings[0][0]:  # what a new connection asks
            self.transport.write(self._greetings.pop(0)[1])
        else:
            self.received.append(data)


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[tuple[Peer, Connection, asyncio.Event]]:
    """A peer, a connection to it, and the event of its loss."""
    peer, lost = Peer(), asyncio.Event()
    server = await asyncio.get_running_loop().create_unix_server(lambda: peer, tmp_path / "s")
    connection = await Connection.open(f"unix://{tmp_path / 's'}", lost.set)
    await peer.connected.wait()
    yield peer, connection, lost
    connection.close()
    peer.transport.abort()
    server.close()


async def test_answers_come_in_the_order_of_the_commands(connection: Connection) -> None:
    answers: list[Answer] = []
    for number in range(1000):
        connection.send(answers.append, "ECHO", number)

    await connection.call("PING")

    assert answers == [str(number).encode() for number in range(1000)]


async def test_commands_of_one_tick_leave_together(peer: tuple[Peer, Connection, asyncio.Event]) -> None:
    other, connection, _ = peer
    for number in range(3):
        connection.send(lambda _: None, "ECHO", number)
    assert other.received == []

    await until(lambda: bool(other.received))

    assert len(other.received) == 1
    assert other.received[0].count(b"ECHO") == 3


@needs_one_server
@pytest.mark.parametrize("options", [(), ("PX", 60_000), ("PX", 60_000, "NX")])
async def test_a_large_value_arrives_whole_wherever_it_stands_in_its_command(
    connection: Connection, options: tuple[object, ...]
) -> None:
    value = bytes(range(256)) * 4096

    assert await connection.call("SET", "large", value, *options) == b"OK"
    assert await connection.call("ECHO", value) == value
    assert await connection.call("GETDEL", "large") == value


@needs_one_server
async def test_several_large_values_of_one_command_arrive_among_small_ones(connection: Connection) -> None:
    large, larger = bytes(range(256)) * 40, bytes(range(255)) * 4096
    values = ("a", large, larger, 1, b"b", large, b"", larger)

    await connection.call("RPUSH", "list", *values)

    expected = [value if isinstance(value, bytes) else str(value).encode() for value in values]
    assert await connection.call("LRANGE", "list", 0, -1) == expected


async def test_an_error_is_the_answer_of_its_own_command_only(connection: Connection) -> None:
    before, wrong, after = await asyncio.gather(
        connection.call("ECHO", "before"),
        connection.call("XADD"),
        connection.call("ECHO", "after"),
        return_exceptions=True,
    )

    assert (before, after) == (b"before", b"after")
    assert isinstance(wrong, RedisError)
    assert "wrong number of arguments" in str(wrong)


async def test_a_command_that_cannot_be_packed_leaves_the_answers_of_the_others_in_order(
    connection: Connection,
) -> None:
    before = asyncio.ensure_future(connection.call("ECHO", "before"))
    await asyncio.sleep(0)
    for command in (("ECHO", "\ud800"), ("ECHO", None), ("SET", "\ud800", bytes(100_000))):
        with pytest.raises((UnicodeEncodeError, TypeError)):
            await connection.call(*command)
    assert await connection.call("ECHO", "after") == b"after"
    assert await before == b"before"


async def test_a_lost_connection_fails_every_open_command_once(
    peer: tuple[Peer, Connection, asyncio.Event],
) -> None:
    other, connection, lost = peer
    answers: list[Answer] = []
    for _ in range(3):
        connection.send(answers.append, "GET", "x")
    connection.flush()

    other.transport.write(b"+one\r\n")
    other.transport.close()
    await lost.wait()

    assert answers[0] == b"one"
    assert [type(answer) for answer in answers[1:]] == [BrokerUnavailable] * 2
    assert not connection.is_open


async def test_a_command_on_a_lost_connection_fails_and_is_not_sent_later(
    peer: tuple[Peer, Connection, asyncio.Event],
) -> None:
    other, connection, lost = peer
    other.transport.close()
    await lost.wait()

    with pytest.raises(BrokerUnavailable):
        await connection.call("SET", "x", "1")


async def test_closing_fails_open_commands_and_does_not_count_as_a_loss(
    peer: tuple[Peer, Connection, asyncio.Event],
) -> None:
    _, connection, lost = peer
    answers: list[Answer] = []
    connection.send(answers.append, "GET", "x")

    connection.close()

    assert [type(answer) for answer in answers] == [BrokerUnavailable]
    await asyncio.sleep(0)
    assert not lost.is_set()


async def test_a_receiver_that_fails_on_the_loss_keeps_it_from_nobody(
    peer: tuple[Peer, Connection, asyncio.Event],
) -> None:
    _, connection, _ = peer
    answers: list[Answer] = []

    def fail(answer: Answer) -> None:
        raise RuntimeError("not now")

    connection.send(fail, "GET", "x")
    connection.send(answers.append, "GET", "y")
    connection.close()

    assert [type(answer) for answer in answers] == [BrokerUnavailable]


async def test_a_receiver_may_close_the_connection_it_is_answered_on(
    peer: tuple[Peer, Connection, asyncio.Event],
) -> None:
    other, connection, _ = peer
    answers: list[Answer] = []
    connection.send(lambda _: connection.close(), "GET", "x")
    connection.send(answers.append, "GET", "y")
    connection.flush()

    other.transport.write(b"+one\r\n+two\r\n")
    await until(lambda: bool(answers))

    assert [type(answer) for answer in answers] == [BrokerUnavailable]


@pytest.mark.parametrize("noise", [b"+nobody asked\r\n", b"\x00\x01 no protocol\r\n"])
async def test_a_server_that_speaks_out_of_turn_is_not_listened_to(
    peer: tuple[Peer, Connection, asyncio.Event], noise: bytes
) -> None:
    other, connection, lost = peer
    asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
    if not noise.startswith(b"+"):
        connection.send(lambda _: None, "GET", "x")

    other.transport.write(noise)

    await asyncio.wait_for(lost.wait(), patience(5))


class Full(asyncio.Protocol):
    """A server that has as many connections as it may have."""

    def __init__(self, *, waits: bool) -> None:
        self._waits = waits
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if not self._waits:
            self._turn_away()

    def data_received(self, _data: bytes) -> None:
        if self._waits:
            self._turn_away()

    def _turn_away(self) -> None:
        self._transport.write(b"-ERR max number of clients reached\r\n")
        self._transport.close()


@pytest.mark.parametrize("waits", [True, False], ids=["when it is asked", "at once"])
@pytest.mark.parametrize("password", ["", ":secret@"], ids=["without a password", "with one"])
async def test_a_server_that_is_full_is_told_as_that_and_may_be_tried_again(waits: bool, password: str) -> None:
    """In place of an error in the log of the event loop, and of advice to check the password."""
    unexpected: list[dict[str, object]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: unexpected.append(context))
    server = await loop.create_server(lambda: Full(waits=waits), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    for _ in range(20):  # whether the server or the first command is faster is left to chance
        with pytest.raises(
            BrokerUnavailable, match=r"^Redis at .* turns connections away: max number of clients reached"
        ):
            await Connection.open(f"redis://{password}127.0.0.1:{port}/0")

    assert unexpected == []
    server.close()


async def test_the_url_says_password_and_database(guarded_server: int) -> None:
    connection = await Connection.open(f"redis://:se%2Fcret@localhost:{guarded_server}/3")
    await connection.call("SET", "here", "1")
    info = await connection.call("CLIENT", "INFO")
    connection.close()

    assert b" db=3 " in info


@pytest.mark.parametrize("url", ["redis://:wrong@localhost:{}", "redis://nobody:x@localhost:{}"])
async def test_a_refused_password_is_a_matter_of_configuration(guarded_server: int, url: str) -> None:
    with pytest.raises(ConfigurationError, match="Redis refused AUTH: WRONGPASS"):
        await Connection.open(url.format(guarded_server))


async def test_a_database_that_does_not_exist_is_a_matter_of_configuration(guarded_server: int) -> None:
    with pytest.raises(ConfigurationError, match="Redis refused SELECT"):
        await Connection.open(f"redis://:se%2Fcret@localhost:{guarded_server}/99")


@pytest.mark.parametrize(("user", "complaint"), [("", "NOAUTH"), ("guest:guest@", "no permissions")])
async def test_missing_rights_are_a_matter_of_configuration(guarded_server: int, user: str, complaint: str) -> None:
    async def work() -> None:
        await link.sender.call("XLEN", "x")

    link = Link(f"redis://{user}localhost:{guarded_server}", work)

    with pytest.raises(ConfigurationError, match=complaint):
        await link.start()


@pytest.mark.parametrize("url", ["", "http://localhost", "localhost:6379", "redis://localhost:port"])
async def test_what_is_no_redis_url_is_a_matter_of_configuration(url: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a Redis URL"):
        await Connection.open(url)


async def test_a_server_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    for url in (f"unix://{tmp_path}/nothing", f"redis://localhost:{free_port()}"):
        with pytest.raises(BrokerUnavailable, match="cannot connect to Redis"):
            await Connection.open(url)


async def test_a_server_that_hangs_up_at_once_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        opening = asyncio.create_task(Connection.open(f"redis://:x@127.0.0.1:{listening.getsockname()[1]}"))
        accepted, _ = await asyncio.to_thread(listening.accept)
        accepted.close()
        with pytest.raises(BrokerUnavailable):
            await opening


def test_a_sentinel_that_resets_every_connection_is_one_that_does_not_answer() -> None:
    """uvloop raises a RuntimeError then, which once ended what makes lost connections anew."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reset_all() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted, _ = server.accept()
                    accepted.recv(1)
                    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    accepted.close()

        async def connect() -> None:
            for _ in range(20):
                with pytest.raises(BrokerUnavailable):
                    await Connection.open(f"redis+sentinel://127.0.0.1:{server.getsockname()[1]}/service")

        resetting = threading.Thread(target=reset_all)
        resetting.start()
        uvloop.run(connect())
        server.shutdown(socket.SHUT_RDWR)
        resetting.join()


@needs_one_server
async def test_a_script_is_loaded_where_the_server_does_not_know_it(
    connection: Connection, redis_client: "redis.Redis"
) -> None:
    script = Script("return {KEYS[1], ARGV[1]}")
    for _ in range(2):
        redis_client.script_flush()
        assert await script.call(connection, ("key",), "argument") == [b"key", b"argument"]


async def test_a_script_that_a_blocking_read_follows_is_loaded_over_another_connection(
    connection: Connection, redis_client: "redis.Redis"
) -> None:
    script, answered = Script("return ARGV[1]"), asyncio.get_running_loop().create_future()
    reading = await connection.another()
    redis_client.script_flush()
    script.send(reading, answered.set_result, (), "argument", again_on=connection)
    reading.send(lambda _answer: None, "XREAD", "BLOCK", 0, "STREAMS", "nothing-comes", "$")  # for ever

    assert await asyncio.wait_for(answered, patience(10)) == b"argument"
    reading.close()


async def test_a_link_comes_back_by_itself_and_tells_when(redis_server: str, redis_client: "redis.Redis") -> None:
    ups = 0
    up = asyncio.Event()

    async def come_up() -> None:
        nonlocal ups
        ups += 1
        up.set()

    link = Link(redis_server, come_up)
    await link.start()
    number = await link.sender.call("CLIENT", "ID")
    up.clear()

    redis_client.client_kill_filter(_id=str(number))

    await asyncio.wait_for(up.wait(), patience(10))
    assert (ups, link.losses) == (2, 1)
    await link.stop()


@pytest.fixture
def two_primaries() -> Iterator[list[int]]:
    """Ports of two servers, each of which takes writes."""
    ports = [free_port(), free_port()]
    with tempfile.TemporaryDirectory() as folder:
        command = [str(embedded.find_server()), "--save", "", "--dir", folder, "--logfile", f"{folder}/log", "--port"]
        servers = [subprocess.Popen([*command, str(port)]) for port in ports]
        try:
            for port in ports:
                wait_until(partial(listens, port))
            yield ports
        finally:
            for server in servers:
                server.kill()
                server.wait()


async def test_both_connections_of_a_link_lead_to_one_server_while_sentinels_disagree(
    two_primaries: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = itertools.cycle(two_primaries)

    async def as_the_next_sentinel_has_it(_broker: Broker, _problems: list[str]) -> AsyncIterator[tuple[str, int]]:
        yield "127.0.0.1", next(told)

    async def come_up() -> None:
        """Nothing to do."""

    monkeypatch.setattr("qserve.broker.connection.primaries_async", as_the_next_sentinel_has_it)
    link = Link("redis+sentinel://127.0.0.1:1/main", come_up)
    await link.start()
    run_ids = {re.search(rb"run_id:(\w+)", await each.call("INFO", "server")) for each in (link.sender, link.waiter)}
    await link.stop()
    assert len({found[1] for found in run_ids if found}) == 1


@pytest.fixture
def lonely_server() -> Iterator[str]:
    """A server of its own, which a test may make a replica."""
    with tempfile.TemporaryDirectory(prefix="qs-") as folder:
        server = subprocess.Popen(embedded.command(Path(folder)))
        try:
            wait_until_accepting(embedded.socket_path(Path(folder)), server)
            yield embedded.redis_url(Path(folder))
        finally:
            server.kill()
            server.wait()


async def test_a_server_that_has_become_a_replica_is_given_up(lonely_server: str) -> None:
    """Even by connections that have asked for its role before."""
    lost = asyncio.Event()
    connection, blocked = await Connection.open(lonely_server, lost.set), await Connection.open(lonely_server)
    waiting = asyncio.ensure_future(blocked.call("BLPOP", "nothing", 20))
    with redis_clients.client(lonely_server, 5) as sync, redis_clients.client(lonely_server, 5, any_role=True) as admin:
        async with redis_clients.asyncio_client(lonely_server, 5) as other:
            assert sync.set("key", 1)
            assert await other.set("key", 1)
            admin.execute_command("REPLICAOF", "127.0.0.1", "1")
            with pytest.raises(RedisError, match="READONLY"):
                await connection.call("SET", "key", "2")
            await asyncio.wait_for(lost.wait(), patience(5))
            with pytest.raises((RedisError, BrokerUnavailable), match=r"UNBLOCKED|lost"):
                await waiting
            with pytest.raises(redis.ConnectionError, match="has become a read-only replica"):
                sync.set("key", 2)
            with pytest.raises(redis.ConnectionError, match="has become a read-only replica"):
                await other.set("key", 2)
            with pytest.raises(redis.ConnectionError, match="is a read-only replica"):
                sync.ping()
            with pytest.raises(redis.ConnectionError, match="is a read-only replica"):
                await other.ping()
            with pytest.raises(BrokerUnavailable, match="is a read-only replica"):
                await Connection.open(lonely_server)
            admin.execute_command("REPLICAOF", "NO", "ONE")
            assert sync.set("key", 3)
            assert await other.set("key", 3)
    connection.close()
    blocked.close()


async def test_a_server_without_enough_replicas_refuses_calls_and_keeps_its_connections(lonely_server: str) -> None:
    connection = await Connection.open(lonely_server)
    with redis_clients.client(lonely_server, 5) as client:
        client.config_set("min-replicas-to-write", 1)
    with pytest.raises(RedisError, match="NOREPLICAS"):
        await connection.call("SET", "key", "1")
    state = State(lonely_server, Keys("test"), Signer(()))
    with contextlib.closing(state), pytest.raises(BrokerUnavailable, match="NOREPLICAS"):
        state.set_http(HttpSettings())
    assert connection.is_open
    connection.close()


async def test_a_server_that_still_reads_its_file_is_not_connected_to() -> None:
    with tempfile.TemporaryDirectory(prefix="qs-") as folder:
        # "everysec" keeps back what it has acknowledged while the disk is busy: a kill costs it.
        command = [*embedded.command(Path(folder)), "--appendonly", "yes", "--appendfsync", "always"]
        url = embedded.redis_url(Path(folder))
        server = _started(command)
        try:
            wait_until_accepting(embedded.socket_path(Path(folder)), server)
            with redis_clients.client(url, 20) as client:
                several = client.pipeline(transaction=False)
                for number in range(5000):
                    several.set("key", number)
                several.execute()
            server.kill()
            server.wait()

            server = _started([*command, "--key-load-delay", "400"])
            wait_until_accepting(embedded.socket_path(Path(folder)), server)
            with pytest.raises(BrokerUnavailable, match="still loading"):
                await Connection.open(url)
            connection = await _open_later(url)
            assert await connection.call("GET", "key") == b"4999"
            connection.close()
        finally:
            server.kill()
            server.wait()


def _started(command: list[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(command)


async def _open_later(url: str) -> Connection:
    async def opened() -> Connection | None:
        with contextlib.suppress(BrokerUnavailable):
            return await Connection.open(url)
        return None

    return await until(opened)


@needs_one_server
async def test_a_connection_that_lay_idle_for_long_is_made_anew(
    redis_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A balancer or firewall may have forgotten it: the first command after lunch would fail."""
    with FaultyLink(redis_server) as link, redis_clients.client(link.url, patience(5)) as client:
        async with redis_clients.asyncio_client(link.url, patience(5)) as other:
            assert await asyncio.to_thread(client.client_id) == await asyncio.to_thread(client.client_id)
            assert await other.client_id() == await other.client_id()
            link.forget()
            monkeypatch.setattr(redis_clients, "_LONG_REST_S", 0)
            assert await asyncio.to_thread(client.ping)
            assert await other.ping()
