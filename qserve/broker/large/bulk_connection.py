"""A blocking connection to Redis for bytes in bulk, used from threads: nothing copies them in this process."""

import io
import socket
from collections.abc import Sequence
from typing import Any, cast

from qserve.broker.redis_errors import CommandRefused
from qserve.broker.server.address import Broker, parse
from qserve.broker.server.redis_clients import primaries, unreachable
from qserve.errors import BrokerUnavailable
from qserve.wire.parts import Buffer

_TIMEOUT_S = 30.0
_CONNECT_TIMEOUT_S = 5.0
_BUFFER = 64 * 1024
_ON_THE_WAY = 2 * 1024 * 1024
"""Bytes that the kernel may hold for the server, so that more is made ready meanwhile; TCP sees to it itself."""


class BulkConnection:
    """Sends commands and reads their answers, in order; whoever uses it decides how many are on their way.

    Raises:
        BrokerUnavailable: From every method: the server cannot be reached, or not any more.
    """

    def __init__(self, url: str) -> None:
        self._socket = _connect(parse(url))
        self._reader = cast("io.BufferedReader", self._socket.makefile("rb", _BUFFER))

    @classmethod
    def open(cls, url: str) -> "BulkConnection":
        """Connect to the primary, authenticate and select the database."""
        self = cls(url)
        broker = parse(url)
        try:
            if broker.username or broker.password:
                self.call(*(["AUTH", broker.username] if broker.username else ["AUTH"]), broker.password)
            if broker.db:
                self.call("SELECT", broker.db)
        except BaseException:
            self.close()
            raise
        return self

    def call(self, *command: Any) -> Any:
        """Send one command and return its answer."""
        self.send(command)
        return self.answer()

    def send(self, *commands: Sequence[Any]) -> None:
        """Send commands; an argument that is a list is the bytes in it, one after the other."""
        pieces: list[Buffer] = []
        small = bytearray()
        for command in commands:
            small += b"*%d\r\n" % len(command)
            for argument in command:
                if isinstance(argument, list):
                    small += b"$%d\r\n" % sum(map(len, argument))
                    for part in argument:
                        if len(part) < _BUFFER:
                            small += part
                        else:
                            pieces += [small, part]
                            small = bytearray()
                    small += b"\r\n"
                else:
                    data = argument if isinstance(argument, bytes) else str(argument).encode()
                    small += b"$%d\r\n%b\r\n" % (len(data), data)
        pieces.append(small)
        try:
            self._write(pieces)
        except OSError as exc:
            raise BrokerUnavailable(f"the connection to Redis was lost: {exc}") from exc

    def _write(self, pieces: list[Buffer]) -> None:
        for piece in pieces:
            self._socket.sendall(piece)

    def answer(self) -> Any:
        """Read one answer; raises CommandRefused where it is an error."""
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"-":
            raise CommandRefused(rest.decode("utf-8", "replace"))
        if kind == b":":
            return int(rest)
        if kind == b"$":
            size = int(rest)
            if size < 0:
                return None
            data = bytearray(size)
            self._fill(memoryview(data))
            self._skip_end()
            return bytes(data)
        if kind == b"*":
            return None if int(rest) < 0 else [self.answer() for _ in range(int(rest))]
        return rest

    def answer_into(self, *places: memoryview) -> int | None:
        """Read one answer, a string of exactly the size of these places; None if there is none.

        Returns:
            The size it has. Where that is another one, nothing of it has been read, and the connection is of no use.
        """
        line = self._line()
        if line[:1] == b"-":
            raise CommandRefused(line[1:].decode("utf-8", "replace"))
        size = int(line[1:])
        if size < 0:
            return None
        if size == sum(map(len, places)):
            for place in places:
                self._fill(place)
            self._skip_end()
        return size

    def close(self) -> None:
        """Disconnect."""
        self._reader.close()
        self._socket.close()

    def _line(self) -> bytes:
        try:
            line = self._reader.readline()
        except OSError as exc:
            raise BrokerUnavailable(f"Redis did not answer: {exc}") from exc
        if not line.endswith(b"\r\n"):
            raise BrokerUnavailable("the connection to Redis was lost")
        return line[:-2]

    def _fill(self, place: memoryview) -> None:
        done = 0
        try:
            while done < len(place):
                got = self._reader.readinto(place[done:])
                if not got:
                    raise BrokerUnavailable("the connection to Redis was lost")
                done += got
        except OSError as exc:
            raise BrokerUnavailable(f"Redis did not answer: {exc}") from exc

    def _skip_end(self) -> None:
        self._fill(memoryview(bytearray(2)))


def _connect(broker: Broker) -> socket.socket:
    try:
        return _connect_here(broker.path) if broker.path else _connect_there(broker)
    except OSError as exc:
        raise BrokerUnavailable(f"cannot connect to Redis at {broker.place}: {exc}") from exc


def _connect_here(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    try:
        made.settimeout(_TIMEOUT_S)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ON_THE_WAY)
        made.connect(path)
    except BaseException:
        made.close()
        raise
    return made


def _connect_there(broker: Broker) -> socket.socket:
    host, port = broker.host, broker.port
    if broker.guides:
        problems: list[str] = []
        found = next(primaries(broker, problems), None)
        if found is None:
            raise BrokerUnavailable(unreachable(broker, problems))
        host, port = found
    made = socket.create_connection((host, port), _CONNECT_TIMEOUT_S)
    made.settimeout(_TIMEOUT_S)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return broker.tls.context.wrap_socket(made, server_hostname=host) if broker.tls else made
