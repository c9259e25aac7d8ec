"""One asyncio connection to Redis for the path of a call.

redis-py spends more time on a command than Redis does, which halves the calls a process can make
(benchmarks/results.md). So the path of a call speaks through this: hiredis packs and parses, all commands of one
event-loop tick leave in one write, and answers go to callbacks in order. Everything off that path uses redis-py.
"""

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import hiredis

from qserve.broker.redis_errors import ASK_AGAIN_S, MOVES_WITHIN_S, CommandRefused, NotTaken, is_moving
from qserve.broker.server.address import Broker, parse, tls_problem
from qserve.broker.server.redis_clients import primaries_async, role_problem, unreachable
from qserve.errors import BrokerUnavailable, ConfigurationError, QServeError

logger = logging.getLogger(__name__)

Answer = Any
"""A parsed RESP value; a failed command's answer is an exception instance."""

_CONNECT_TIMEOUT_S = 5.0
PRIMARY_TIMEOUT_S = 2.0
"""For a primary that a sentinel names, which may be the one that has just died."""
_FOREIGN = ("READONLY", "MASTERDOWN", "UNBLOCKED force unblock")
"""How errors begin that a server answers when it has become a replica."""
_MOVED = ("MOVED", "CLUSTERDOWN")
"""How errors begin that a server of a cluster answers when it does not have the slot of the keys any more."""
_WRONG = ("NOAUTH", "NOPERM", "WRONGPASS", "ERR")
"""How errors begin that another attempt does not change."""
_FULL = "ERR max number of clients"
"""How the error begins that a server sends to a connection beyond its maxclients, before it closes it: as the answer to
the first command, or to none."""
_LARGE = 8 * 1024
_LAST_ANSWERS_S = 1.5
"""How long a connection that is given up may wait for the answers it is owed."""
_KEEPALIVE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))


def ignore_answer(_answer: Answer) -> None:
    """Ignore the answer of a command whose failure shows elsewhere."""


_ELSEWHERE = "a part of the Redis cluster is being moved or is down, and this was not done"
_LOST = "the connection to Redis was lost before it answered: it may have done this or not; a new one is being made"


class Connection(asyncio.Protocol):
    """A connection that pipelines by itself. Bound to the loop it was opened on; not thread-safe.

    A new instance is closed; `open` makes one that is connected. A lost connection is not reopened here and no command
    is ever sent twice: every unanswered command's callback gets a `BrokerUnavailable`, and so does that of every
    command sent from then on. The owner opens another connection.
    """

    def __init__(self, on_lost: Callable[[], None] | None = None, on_moved: Callable[[], None] | None = None) -> None:
        self._loop: asyncio.AbstractEventLoop
        self._reader = hiredis.Reader(notEnoughData=_NOTHING, replyError=self._error)
        self._waiting: deque[Callable[[Answer], None]] = deque()
        self._out: list[bytes] = []
        self.heard = 0
        """How often data has come, for whoever watches that it does."""
        self._server: Broker
        self._transport: asyncio.Transport | None = None
        self._retired: asyncio.Transport | None = None
        self._turned_away = ""
        self._on_lost = on_lost
        self._on_moved = on_moved or self.retire

    @classmethod
    async def open(
        cls, url: str, on_lost: Callable[[], None] | None = None, on_moved: Callable[[], None] | None = None
    ) -> "Connection":
        """Connect to the primary, authenticate and select the database.

        Args:
            url: What QSERVE_REDIS_URL may be; of a cluster, with the slot that is meant.
            on_lost: Called once when the connection is gone, unless `close` was called.
            on_moved: Called when the server does not have the slot any more; `retire` where it is not given.

        Raises:
            BrokerUnavailable: No primary answers there.
            ConfigurationError: It answers, but refuses the password, the database or our certificate, or we refuse its;
                or this is no Redis URL.
        """
        broker = parse(url)
        if not broker.guides:
            return await cls(on_lost).open_at(broker, _CONNECT_TIMEOUT_S)
        problems: list[str] = []
        async for address in primaries_async(broker, problems):
            try:
                return await cls(on_lost, on_moved).open_at(broker.at(address), PRIMARY_TIMEOUT_S)
            except BrokerUnavailable as exc:
                problems.append(str(exc))
        raise BrokerUnavailable(unreachable(broker, problems))

    async def another(
        self, on_lost: Callable[[], None] | None = None, on_moved: Callable[[], None] | None = None
    ) -> "Connection":
        """A second connection to the very server that this one leads to; raises like `open`."""
        return await Connection(on_lost, on_moved).open_at(self._server, PRIMARY_TIMEOUT_S)

    async def open_at(self, server: Broker, timeout_s: float) -> "Connection":
        """Connect this one to the server at an address; raises like `open`."""
        self._loop = asyncio.get_running_loop()
        self._server = server
        try:
            async with asyncio.timeout(timeout_s):
                await self._connect(server)
                await _greet(self, server)
        except (OSError, TimeoutError) as exc:
            self.close()
            if self._turned_away:
                raise BrokerUnavailable(self._turned_away) from exc
            if problem := tls_problem(exc, server.place):
                raise ConfigurationError(". ".join(problem)) from exc
            text = f"cannot connect to Redis at {server.place}: {exc or type(exc).__name__}"
            raise BrokerUnavailable(f"{text}. Check that it runs there, and what QSERVE_REDIS_URL says") from exc
        except BaseException:
            self.close()
            raise
        return self

    async def _connect(self, server: Broker) -> None:
        if server.path:
            await self._loop.create_unix_connection(lambda: self, server.path)
            return
        tls = server.tls.context if server.tls else None
        await self._loop.create_connection(lambda: self, server.host, server.port, ssl=tls)

    @property
    def is_open(self) -> bool:
        """Whether commands can be sent."""
        return self._transport is not None

    def send(self, on_answer: Callable[[Answer], None], *command: Any) -> None:
        """Send a command at the end of this tick; its answer or exception goes to `on_answer`, in order."""
        if self._transport is None:
            lost = BrokerUnavailable("the connection to Redis is lost, and this was not sent: try again in a moment")
            asyncio.get_running_loop().call_soon(on_answer, lost)
            return
        if not self._out:
            self._loop.call_soon(self.flush)
        largest = command[2] if command[0] == "SET" else command[-1]
        if type(largest) is bytes and len(largest) > _LARGE:
            self._out += _pack_large(command)
        else:
            self._out.append(hiredis.pack_command(command))
        self._waiting.append(on_answer)  # not before: packing raises where an argument is nothing that Redis takes

    def send_now(self, on_answer: Callable[[Answer], None], *command: Any) -> None:
        """Like `send`, but does not wait for the end of the tick."""
        self.send(on_answer, *command)
        self.flush()

    @property
    def is_idle(self) -> bool:
        """Whether no answer is awaited: then it only costs time to wait for other commands to send along."""
        return not self._waiting

    @property
    def has_unsent(self) -> bool:
        """Whether there are commands that leave at the end of this tick."""
        return bool(self._out) and self.is_open

    async def call(self, *command: Any) -> Answer:
        """Send a command and return its answer. While a cluster moves its keys one by one, it is sent again.

        Raises:
            BrokerUnavailable: The connection was lost first; the command may have been carried out.
            CommandRefused: Redis refused the command.
        """
        until = 0.0
        while True:
            future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            self.send(partial(settle, future), *command)
            try:
                return await future
            except CommandRefused as exc:
                until = until or time.monotonic() + MOVES_WITHIN_S
                if not is_moving(exc) or time.monotonic() > until:
                    raise
            await asyncio.sleep(ASK_AGAIN_S)

    async def settle_all(self) -> None:
        """Wait until everything that was sent before is answered; raises like `call`."""
        await self.call("PING")

    def flush(self) -> None:
        """Write what `send` has collected."""
        if self._out and self._transport is not None:
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def descriptor(self) -> int | None:
        """The socket's file descriptor, None when closed."""
        sock = self._transport.get_extra_info("socket") if self._transport is not None else None
        return sock.fileno() if sock is not None else None

    def close(self) -> None:
        """Close without calling `on_lost`; unanswered commands fail."""
        self._on_lost = None
        self.abort()

    def give_up(self) -> None:
        """Count it as lost, for all who share it."""
        self.abort()

    def retire(self) -> None:
        """Take no commands any more, and close when those that were sent are answered."""
        if self._transport is None:
            return
        self.flush()
        self._retired, self._transport = self._transport, None
        self._loop.call_later(_LAST_ANSWERS_S, self.abort)
        if not self._waiting:
            self._loop.call_soon(self.abort)

    @property
    def is_retiring(self) -> bool:
        """Whether it still waits for the last answers."""
        return self._retired is not None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's does not say that it is one
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE:
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def data_received(self, data: bytes) -> None:
        reader, waiting = self._reader, self._waiting
        self.heard += 1
        reader.feed(data)
        try:
            while (answer := reader.gets()) is not _NOTHING:
                (waiting.popleft() if waiting else self._ignore_unasked)(answer)
                if self._transport is None:
                    if self._retired is None:
                        return  # that answer made its receiver close the connection
                    if not waiting:
                        self.abort()
                        return
        except hiredis.ProtocolError as exc:
            logger.error("what answers is not Redis: %s", exc)
            self.abort()

    def _ignore_unasked(self, answer: Answer) -> None:
        if not self._turned_away:
            logger.error("what answers is not Redis: it says %.100r, and was not asked", answer)
        self.abort()

    def _error(self, text: str) -> Exception:
        if text.startswith(_FULL):
            said = f"Redis at {self._server.place} turns connections away: {text.removeprefix('ERR ')}"
            self._turned_away = f"{said}. Raise its maxclients, or end processes that it serves"
            return BrokerUnavailable(self._turned_away)
        if text.startswith(_MOVED):
            self._loop.call_soon(self._on_moved)
            return NotTaken(_ELSEWHERE)
        if text.startswith(_FOREIGN):
            # The other answers first: their commands may have been carried out before.
            self._loop.call_soon(self.abort)
        return CommandRefused(text)

    def abort(self) -> None:
        """Close as if it were lost."""
        transport = self._transport or self._retired
        if transport is not None:
            transport.abort()
            self._lose()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None or self._retired is not None:
            self._lose()

    def _lose(self) -> None:
        self._transport = self._retired = None
        self._out.clear()
        lost = list(self._waiting)
        self._waiting.clear()
        for on_answer in lost:
            try:
                on_answer(BrokerUnavailable(_LOST))
            except Exception:  # the others have to learn of it all the same
                logger.exception("the receiver of an answer failed on the loss of its connection")
        if self._on_lost is not None:
            self._on_lost()


async def _greet(connection: Connection, server: Broker) -> None:
    if server.username:
        await _expect_ok(connection, "AUTH", server.username, server.password)
    elif server.password:
        await _expect_ok(connection, "AUTH", server.password)
    if server.db:
        await _expect_ok(connection, "SELECT", server.db)
    await _expect_data(connection, server.place)
    try:
        role = await connection.call("ROLE")
    except CommandRefused:  # this user may not ask; a replica shows itself at the first write
        return
    if problem := role_problem(role, server.place):
        raise BrokerUnavailable(problem)


async def _expect_data(connection: Connection, place: str) -> None:
    # While a server reads its file it lets one in, and refuses every other command.
    try:
        await connection.call("PING")
    except CommandRefused as exc:
        if str(exc).startswith("LOADING"):
            raise BrokerUnavailable(f"Redis at {place} is still loading its data: try again when it has") from exc


async def _expect_ok(connection: Connection, *command: Any) -> None:
    try:
        await connection.call(*command)
    except CommandRefused as exc:
        kind: type[QServeError] = ConfigurationError if str(exc).startswith(_WRONG) else BrokerUnavailable
        why = str(exc).rstrip(".")
        raise kind(f"Redis refused {command[0]}: {why}. Check user, password and database in QSERVE_REDIS_URL") from exc


def _pack_large(command: tuple[Any, ...]) -> list[bytes]:
    # hiredis takes 1.2 ms to pack a MiB, ten times what copying it costs.
    pieces: list[bytes] = [b"*%d" % len(command)]
    small: list[Any] = []
    for argument in command:
        if type(argument) is bytes and len(argument) > _LARGE:
            pieces += (b"%b$%d\r\n" % (_pack_small(small), len(argument)), argument)
            small.clear()
        else:
            small.append(argument)
    return [*pieces, _pack_small(small)]


def _pack_small(arguments: list[Any]) -> bytes:
    """What stands behind the last argument, and then these ones."""
    packed: bytes = hiredis.pack_command(tuple(arguments))
    return packed[packed.index(b"\r\n") :]


class _Nothing:
    """What the parser returns when it needs more bytes; the default of hiredis, False, could be an answer."""


_NOTHING = _Nothing()


def settle(future: asyncio.Future[Answer], answer: Answer) -> None:
    """Give an answer to whoever awaits it."""
    if future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
