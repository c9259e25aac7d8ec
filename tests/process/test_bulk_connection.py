"""The connection for bytes in bulk: what it carries, and what becomes of it when its server fails."""

import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from subprocess import Popen

import pytest

from qserve.broker.large.bulk_connection import BulkConnection
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.server import embedded
from qserve.errors import BrokerUnavailable
from tests.support.chosen_server import needs_one_server
from tests.support.serving import free_port
from tests.support.waiting import wait_until


@pytest.fixture
def connection(redis_server: str, redis_client: object) -> Iterator[BulkConnection]:
    """A connection to an empty server."""
    with closing(BulkConnection.open(redis_server)) as connection:
        yield connection


@contextmanager
def saying(data: bytes) -> Iterator[str]:
    """The URL of a server that says this to whoever connects, and hangs up."""

    def serve() -> None:
        client, _ = listener.accept()
        with client:
            client.recv(1000)
            client.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


@needs_one_server
def test_answers_of_every_kind_come_in_order(connection: BulkConnection) -> None:
    connection.send(
        ("SET", "a", [b"head ", bytes(100_000), b"tail"], "PX", 60_000),
        ("STRLEN", "a"),
        ("GET", "nothing"),
        ("GETRANGE", "a", 0, 4),
        ("RPUSH", "list", 1, 2),
        ("LRANGE", "list", 0, -1),
        ("BLPOP", "empty", 0.001),
    )
    assert [connection.answer() for _ in range(7)] == [b"OK", 100_009, None, b"head ", 2, [b"1", b"2"], None]


@needs_one_server
def test_a_refused_command_harms_none_of_the_others(connection: BulkConnection) -> None:
    connection.send(("INCR", "a", "b"), ("PING",))
    with pytest.raises(CommandRefused, match="wrong number of arguments"):
        connection.answer()
    assert connection.answer() == b"PONG"
    connection.send(("LPUSH", "list", 1), ("GET", "list"))
    connection.answer()
    with pytest.raises(CommandRefused, match="WRONGTYPE"):
        connection.answer_into(memoryview(bytearray(1)))


@needs_one_server
def test_a_string_is_read_into_places_of_its_size_and_no_other(connection: BulkConnection) -> None:
    connection.call("SET", "a", b"x" * 32 + b"y" * 200_000)
    tag, place = bytearray(32), bytearray(200_000)
    connection.send(("GET", "a"), ("GET", "nothing"), ("GET", "a"))
    assert connection.answer_into(memoryview(tag), memoryview(place)) == 200_032
    assert bytes(tag) + bytes(place) == b"x" * 32 + b"y" * 200_000
    assert connection.answer_into(memoryview(tag)) is None
    assert connection.answer_into(memoryview(tag)) == 200_032, "and nothing of it is read"
    assert tag == b"x" * 32


@pytest.mark.parametrize("data", [b"", b"$10", b"$10\r\nfour", b"*2\r\n:1\r\n"])
def test_a_server_that_hangs_up_is_an_error_of_ours(data: bytes) -> None:
    lost = pytest.raises(BrokerUnavailable, match=r"the connection to Redis was lost|did not answer")
    with saying(data) as url, closing(BulkConnection.open(url)) as connection, lost:
        connection.call("GET", "a")


def test_nobody_there_is_an_error_of_ours(tmp_path: Path) -> None:
    for url in (f"redis://127.0.0.1:{free_port()}", f"unix://{tmp_path}/none"):
        with pytest.raises(BrokerUnavailable, match="cannot connect to Redis at"):
            BulkConnection.open(url)


def test_sending_to_a_server_that_is_gone_is_an_error_of_ours() -> None:
    with saying(b"") as url, closing(BulkConnection.open(url)) as connection:
        connection.send(("PING",))
        with pytest.raises(BrokerUnavailable):
            connection.answer()
        with pytest.raises(BrokerUnavailable, match="the connection to Redis was lost"):
            connection.send(*[("SET", "a", [bytes(1_000_000)])] * 100)


def test_passwords_users_and_databases_are_those_of_the_url() -> None:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        options = f'port {port}\ndir {folder}\nsave ""\nrequirepass secret\nuser guest on >guest ~* +@all\n'
        options += "user open on nopass ~* +@all\n"
        (Path(folder) / "valkey.conf").write_text(f"{options}logfile {folder}/log")
        server = Popen([str(embedded.find_server()), f"{folder}/valkey.conf"])
        try:
            wait_until(partial(listens, port))
            with closing(BulkConnection.open(f"redis://:secret@127.0.0.1:{port}/2")) as connection:
                connection.call("SET", "a", "there")
            with closing(BulkConnection.open(f"redis://guest:guest@127.0.0.1:{port}/2")) as connection:
                assert (connection.call("GET", "a"), connection.call("ACL", "WHOAMI")) == (b"there", b"guest")
            with closing(BulkConnection.open(f"redis://open@127.0.0.1:{port}")) as connection:
                assert connection.call("ACL", "WHOAMI") == b"open"
            with pytest.raises(CommandRefused, match="WRONGPASS"):
                BulkConnection.open(f"redis://guest:wrong@127.0.0.1:{port}")
        finally:
            server.kill()
            server.wait()
