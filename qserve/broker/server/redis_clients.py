"""Clients of redis-py for everything off the path of a call: they find the primary, and never talk to a replica.

All connections of a process are made alike, whatever the URL: no command is ever repeated by itself, each connection
asks what it is connected to, and one whose server has become a replica is given up.
"""

import functools
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import redis
import redis.asyncio
import redis.utils
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    ConnectionError,  # noqa: A004
    MasterDownError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004
)

from qserve.broker.server.address import Address, Broker, host_and_port, parse
from qserve.broker.server.cluster_clients import AsyncClusterClient, ClusterClient, primaries_and_slots, primary_of_slot

_GUIDE_TIMEOUT_S: Final = 0.5
_CONNECT_TIMEOUT_S: Final = 2.0
_REST_S: Final = 2.0
"""How long a connection may lie idle before its guides are asked whether it still leads to the primary."""
_LONG_REST_S: Final = 30.0
"""How long it may lie idle before it is made anew: what is between us and the server may have forgotten it by then, and
the next command would fail, or wait in vain for its answer."""
_ASK: Final = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME")


AsyncClient = redis.asyncio.Redis
"""A client for an event loop. Outside of this folder it is only handed on, like `Client`."""
Client = redis.Redis
"""A synchronous client. Outside of this folder it is only handed on, to the functions that are here."""


def client(url: str, timeout_s: float, *, any_role: bool = False, **options: Any) -> redis.Redis:
    """A synchronous client; of a cluster it sends each command to the server that has its keys.

    Args:
        timeout_s: How long it waits for an answer; for a connection at most two seconds of that.
        any_role: The server may be a replica.
        options: Further options of redis-py's connections.

    Raises:
        ConfigurationError: Not a Redis URL.
    """
    broker, greet = parse(url), None if any_role else _greet
    if not broker.nodes or broker.slot >= 0:
        return _client(broker, timeout_s, greet, options)
    return ClusterClient(lambda slot: _client(broker.of_slot(slot), timeout_s, greet, options))


def prepare_forks() -> None:
    """Do once what each process does for its first connection, before processes are forked: it fills caches.

    No connection is opened.
    """
    redis.utils.get_lib_version = functools.cache(redis.utils.get_lib_version)  # else read for each connection
    redis.Connection()  # type: ignore[no-untyped-call]


def asyncio_client(url: str, timeout_s: float) -> "redis.asyncio.Redis":
    """A client for an event loop; else like `client`."""
    broker = parse(url)
    if not broker.nodes or broker.slot >= 0:
        return _asyncio_client(broker, timeout_s, _greet_async)
    return AsyncClusterClient(lambda slot: _asyncio_client(broker.of_slot(slot), timeout_s, _greet_async))


def unreachable(broker: Broker, problems: list[str]) -> str:
    """Return what is said when no guide names a primary that can be used."""
    return f"found nothing to connect to for {broker.place}: {'; '.join(problems)}"


def role_problem(answer: object, place: str) -> str:
    """Return what is wrong with a server that answers ROLE like this; "" if it takes writes, or does not tell."""
    role = answer[0] if isinstance(answer, list) and answer else b"master"
    return "" if role == b"master" else f"Redis at {place} is a read-only replica"


# Asking sentinels, or the nodes of a cluster


def primaries(broker: Broker, problems: list[str]) -> Iterator[Address]:
    """Yield where the primary is, as each guide in turn has it, without an address twice.

    What goes wrong is added to `problems`.

    Several, because a guide that was cut off from the others may know an old one only.
    """
    told = set()
    for address in list(broker.guides):
        try:
            with _client(broker.guide(address), _GUIDE_TIMEOUT_S, None, {}) as guide:
                answer = guide.execute_command(*_question(broker))
        except (RedisError, OSError) as exc:
            problems.append(f"{_kind_of_guide(broker)} {host_and_port(address)}: {reason(exc)}")
            continue
        primary = _understand(broker, address, answer, problems)
        if primary is not None and primary not in told:
            told.add(primary)
            yield primary


async def primaries_async(broker: Broker, problems: list[str]) -> AsyncIterator[Address]:
    """Like `primaries`, on an event loop."""
    told = set()
    for address in list(broker.guides):
        try:
            async with _asyncio_client(broker.guide(address), _GUIDE_TIMEOUT_S, None) as guide:
                answer: Any = await guide.execute_command(*_question(broker))  # type: ignore[no-untyped-call]
        except (RedisError, OSError) as exc:
            problems.append(f"{_kind_of_guide(broker)} {host_and_port(address)}: {reason(exc)}")
            continue
        primary = _understand(broker, address, answer, problems)
        if primary is not None and primary not in told:
            told.add(primary)
            yield primary


def primaries_of_cluster(broker: Broker, failures: dict[Address, Exception]) -> tuple[list[Address], int]:
    """Where all primaries of a cluster are, and how many slots they have; why each node that was asked did not say it
    is added to `failures`."""
    for address in list(broker.nodes):
        try:
            with _client(broker.guide(address), _GUIDE_TIMEOUT_S, None, {}) as guide:
                return primaries_and_slots(guide.execute_command("CLUSTER SLOTS"), address)
        except (RedisError, OSError) as exc:
            failures[address] = exc
    return [], 0


def client_at(broker: Broker, address: Address, timeout_s: float) -> redis.Redis:
    """A client for one of the servers of a cluster."""
    return _client(broker.at(address), timeout_s, None, {})


def reason(exc: Exception) -> str:
    """What an error says, in a form to which a sentence can be added."""
    return str(exc).rstrip(".") or type(exc).__name__


def _kind_of_guide(broker: Broker) -> str:
    return "node" if broker.nodes else "sentinel"


def _question(broker: Broker) -> tuple[str, ...]:
    return ("CLUSTER SLOTS",) if broker.nodes else (*_ASK, broker.service)


def _understand(broker: Broker, guide: Address, answer: Any, problems: list[str]) -> Address | None:
    if broker.nodes:
        found, nodes = primary_of_slot(answer, guide, broker.slot)
        broker.learn(nodes)
        if found is None:
            problems.append(f"node {host_and_port(guide)} knows no primary of slot {broker.slot}")
        else:
            broker.prefer(guide)
        return found
    if answer is None:
        problems.append(f"sentinel {host_and_port(guide)} does not know {broker.service!r}")
        return None
    broker.prefer(guide)
    host, port = answer
    return (host.decode() if isinstance(host, bytes) else str(host)), int(port)


# Clients


def _client(broker: Broker, timeout_s: float, greet: Any, options: dict[str, Any]) -> redis.Redis:
    kinds: tuple[Any, ...] = (_Tcp, _Tls, _Unix)
    options = options | {"broker": broker, "redis_connect_func": greet, "retry": redis.retry.Retry(NoBackoff(), 0)}
    return redis.Redis.from_pool(redis.ConnectionPool(_kind(broker, kinds), **_options(broker, timeout_s), **options))


def _asyncio_client(broker: Broker, timeout_s: float, greet: Any) -> "redis.asyncio.Redis":
    kinds: tuple[Any, ...] = (_AsyncTcp, _AsyncTls, _AsyncUnix)
    retry = redis.asyncio.retry.Retry(NoBackoff(), 0)
    options = _options(broker, timeout_s) | {"broker": broker, "redis_connect_func": greet, "retry": retry}
    return redis.asyncio.Redis.from_pool(redis.asyncio.ConnectionPool(_kind(broker, kinds), **options))


def _kind(broker: Broker, kinds: tuple[Any, ...]) -> Any:
    tcp, tls, unix = kinds
    if broker.path:
        return unix
    return tls if broker.tls else tcp


def _options(broker: Broker, timeout_s: float) -> dict[str, Any]:
    options: dict[str, Any] = {
        "username": broker.username or None,
        "password": broker.password or None,
        "db": broker.db,
        "protocol": 2,  # asking for RESP3 would fail on servers too old to be told so
        "socket_timeout": timeout_s,
        "socket_connect_timeout": min(timeout_s, _CONNECT_TIMEOUT_S),
    }
    if broker.path:
        return options | {"path": broker.path}
    options |= {"host": broker.host, "port": broker.port, "socket_keepalive": True}
    return options | (broker.tls.options if broker.tls else {})


# Connections. redis-py has them twice, and so have we.


class _Rested:
    """Base of connections that know how long they have not been used."""

    host: str
    port: int

    def __init__(self, *, broker: Broker, **options: Any) -> None:
        self._broker = broker
        self._used_at = time.monotonic()
        super().__init__(**options)

    def _rest_s(self) -> float:
        before, self._used_at = self._used_at, time.monotonic()
        return self._used_at - before

    def _is_at(self, primary: Address | None) -> bool:
        return primary is None or primary == (self.host, self.port)


class _Finding(_Rested):
    """Base of connections that ask their guides, where there are any, before they connect and again after a rest."""

    _sock: Any

    def connect(self) -> None:
        rest_s = self._rest_s()
        if self._sock is not None and rest_s > _LONG_REST_S:
            self.disconnect()  # type: ignore[attr-defined]
        if not self._broker.guides:
            super().connect()  # type: ignore[misc]
            return
        if self._sock is not None:
            # A primary that was cut off or frozen does not know yet that it is one no more, and neither do we.
            if rest_s <= _REST_S or self._is_at(next(primaries(self._broker, []), None)):
                return
            self.disconnect()  # type: ignore[attr-defined]
        problems: list[str] = []
        failure: Exception | None = None
        for address in primaries(self._broker, problems):
            self.host, self.port = address
            try:
                super().connect()  # type: ignore[misc]
            except AuthenticationError:
                raise
            except (ConnectionError, TimeoutError, OSError) as exc:
                failure = exc
                problems.append(reason(exc))
            else:
                return
        raise ConnectionError(unreachable(self._broker, problems)) from failure

    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)  # type: ignore[misc]
        except (ReadOnlyError, MasterDownError) as exc:
            self.disconnect()  # type: ignore[attr-defined]
            raise ConnectionError(f"Redis at {_place(self)} has become a read-only replica") from exc


class _Tcp(_Finding, redis.Connection):
    """A connection to a host and port."""


class _Tls(_Finding, redis.SSLConnection):
    """An encrypted connection to a host and port."""


class _Unix(_Finding, redis.UnixDomainSocketConnection):
    """A connection to a socket."""


class SlotConnection(_Tcp):
    """A connection to the primary of a slot, for a library that knows nothing of clusters: when the slot has moved, the
    connection is lost. It stays where it is until then: what it has subscribed to is told by every server."""

    def _rest_s(self) -> float:
        return 0.0

    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)
        except (AskError, ClusterDownError) as exc:  # a MovedError is an AskError
            self.disconnect()  # type: ignore[no-untyped-call]
            raise ConnectionError("the slot has moved to another server of the cluster") from exc


class SlotTlsConnection(SlotConnection, _Tls):
    """The same, encrypted."""


class _AsyncFinding(_Rested):
    """Like `_Finding`, for an event loop."""

    is_connected: bool

    async def connect(self) -> None:
        rest_s = self._rest_s()
        if self.is_connected and rest_s > _LONG_REST_S:
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
        if not self._broker.guides:
            await super().connect()  # type: ignore[misc]
            return
        if self.is_connected:
            if rest_s <= _REST_S or self._is_at(await anext(primaries_async(self._broker, []), None)):
                return
            await self.disconnect()  # type: ignore[attr-defined]
        problems: list[str] = []
        failure: Exception | None = None
        async for address in primaries_async(self._broker, problems):
            self.host, self.port = address
            try:
                await super().connect()  # type: ignore[misc]
            except AuthenticationError:
                raise
            except (ConnectionError, TimeoutError, OSError) as exc:
                failure = exc
                problems.append(reason(exc))
            else:
                return
        raise ConnectionError(unreachable(self._broker, problems)) from failure

    async def send_packed_command(self, *args: Any, **options: Any) -> None:
        try:
            await super().send_packed_command(*args, **options)  # type: ignore[misc]
        except RuntimeError as exc:  # what uvloop raises where the other side has reset the connection
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise ConnectionError(f"the connection to {_place(self)} is lost") from exc

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)  # type: ignore[misc]
        except (ReadOnlyError, MasterDownError) as exc:
            await self.disconnect()  # type: ignore[attr-defined]
            raise ConnectionError(f"Redis at {_place(self)} has become a read-only replica") from exc


class _AsyncTcp(_AsyncFinding, redis.asyncio.Connection):
    """A connection to a host and port."""


class _AsyncTls(_AsyncFinding, redis.asyncio.SSLConnection):
    """An encrypted connection to a host and port."""


class _AsyncUnix(_AsyncFinding, redis.asyncio.UnixDomainSocketConnection):
    """A connection to a socket."""


def _place(connection: Any) -> str:
    broker: Broker = connection._broker
    return broker.path or broker.at((connection.host, connection.port)).place


def _greet(connection: Any) -> None:
    connection.on_connect()
    connection.send_command("ROLE")
    try:
        answer = connection.read_response()
    except ResponseError:  # this user may not ask; a replica shows itself at the first write
        return
    problem = role_problem(answer, _place(connection))
    if problem:
        raise ConnectionError(problem)


async def _greet_async(connection: Any) -> None:
    await connection.on_connect()
    await connection.send_command("ROLE")
    try:
        answer = await connection.read_response()
    except ResponseError:
        return
    problem = role_problem(answer, _place(connection))
    if problem:
        raise ConnectionError(problem)
