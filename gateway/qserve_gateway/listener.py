"""A listener: one address where an ASGI application answers HTTP, from bind to the last response."""

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from qserve.background import until_next
from qserve.errors import ConfigurationError
from qserve_gateway.door.limits import Door
from qserve_gateway.door.protocol import HttpProtocol
from qserve_gateway.door.websocket_protocol import WebSocketProtocol

BACKLOG = 2048
_LAST_WORD_S = 1.0
_LARGEST_WEBSOCKET_MESSAGE = 1024 * 1024


@dataclass(frozen=True)
class ListenAddress:
    """Where to listen.

    Attributes:
        port: 0 for any free one.
        fd: An inherited socket, which is bound already; host and port are ignored then.
        reuse_port: Several processes of this machine share the port.
        or_any_port: If the port is taken, any free one will do.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    fd: int | None = None
    reuse_port: bool = False
    or_any_port: bool = False


@dataclass(frozen=True)
class TlsFiles:
    """Certificates for HTTPS, as uvicorn's options of these names.

    Attributes:
        ca_certs: Clients have to show a certificate of one of these authorities.
    """

    certfile: str
    keyfile: str | None = None
    keyfile_password: str | None = None
    ca_certs: str | None = None


class Listener:
    """One address and the application that answers there.

    First `bind`, then `start`, then `stop`.

    Args:
        app: Answers the requests, and WebSockets where they are let in.
        address: Where to listen.
        door: Limits, deadlines and the access log of its connections; opened and closed with the listener.
        websockets: Let WebSockets in.
        tls: How to speak HTTPS; None for HTTP.
        trusted_proxies: Addresses whose X-Forwarded-* headers are believed, as in uvicorn; "" for none.
        graceful_shutdown_timeout_s: How long requests in flight may take to finish when it stops.
    """

    def __init__(
        self,
        app: ASGIApp,
        address: ListenAddress,
        door: Door,
        *,
        websockets: bool = False,
        tls: TlsFiles | None = None,
        trusted_proxies: str = "",
        graceful_shutdown_timeout_s: int = 1,
    ) -> None:
        self._app = app
        self._address = address
        self._door = door
        self._websockets = websockets
        self._tls = tls
        self._trusted_proxies = trusted_proxies
        self._graceful_shutdown_timeout_s = graceful_shutdown_timeout_s
        self._socket: socket.socket
        self._server: _Server | None = None
        self.serving: asyncio.Task[None] | None = None
        """Ends when the listener does; None before it has started."""

    @contextlib.contextmanager
    def bind(self) -> Iterator[None]:
        """Take the address for as long as the context lasts; connections wait until `start`.

        Raises:
            ConfigurationError: The port is taken, or the address is not one of this machine's.
        """
        with _bound_socket(self._address) as self._socket:
            yield

    @property
    def host(self) -> str:
        """The address it is bound to."""
        return str(self._socket.getsockname()[0])

    @property
    def port(self) -> int:
        """The port it is bound to."""
        return int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        """Where it can be reached from this machine."""
        host = self.host
        reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
        return f"{'https' if self._tls else 'http'}://{reachable}:{self.port}"

    async def start(self) -> None:
        """Answer requests from now on.

        Raises:
            ConfigurationError: The certificates cannot be used, or nobody can listen there.
        """
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._server = _Server(self._uvicorn_config(), started, self._door.header_timeout_s)
        self.serving = asyncio.create_task(self._server.serve([self._socket]))
        self._door.open()
        await asyncio.wait({started, self.serving}, return_when=asyncio.FIRST_COMPLETED)
        if self.serving.done():
            raise _cannot_listen(self._address, self.serving.exception())

    async def stop(self) -> None:
        """Take no more connections and wait for the requests in flight; without effect before it has started."""
        if self._server is None or self.serving is None:
            return
        self._server.leave()
        try:
            await self.serving
        finally:
            await self._door.close()

    def cut_off(self) -> None:
        """Let `stop` wait for no request."""
        if self._server is not None:
            self._server.force_exit = True

    def _uvicorn_config(self) -> uvicorn.Config:
        tls = self._tls
        config = uvicorn.Config(
            self._app,
            http=cast(Any, partial(HttpProtocol, self._door)),
            ws=cast(Any, partial(WebSocketProtocol, self._door)) if self._websockets else "none",
            ws_max_size=_LARGEST_WEBSOCKET_MESSAGE,
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=bool(self._trusted_proxies),
            forwarded_allow_ips=self._trusted_proxies,
            timeout_graceful_shutdown=self._graceful_shutdown_timeout_s,
            ssl_certfile=tls.certfile if tls else None,
            ssl_keyfile=tls.keyfile if tls else None,
            ssl_keyfile_password=tls.keyfile_password if tls else None,
            ssl_ca_certs=tls.ca_certs if tls else None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if tls and tls.ca_certs else ssl.CERT_NONE,
        )
        try:
            config.load()
        except OSError as exc:  # ssl.SSLError too
            raise ConfigurationError(f"the TLS certificate or key cannot be used: {exc}") from exc
        return config


class _Server(uvicorn.Server):
    """uvicorn, without its signal handlers: they end the process before the gateway has left in order.

    Args:
        started: Resolved when connections are accepted.
        handshake_timeout_s: How long a TLS handshake may take; until it is complete the door knows of no connection.
    """

    def __init__(self, config: uvicorn.Config, started: asyncio.Future[None], handshake_timeout_s: float) -> None:
        super().__init__(config)
        self._started = started
        self._tls: dict[str, Any] = {"ssl": config.ssl}
        if config.ssl is not None:
            self._tls["ssl_handshake_timeout"] = handshake_timeout_s
        self._leaving = asyncio.Event()

    def leave(self) -> None:
        """Take no more connections, and end when the requests in flight have."""
        self.should_exit = True
        self._leaving.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections."""
        loop = asyncio.get_running_loop()
        backlog = self.config.backlog
        self.servers = [
            await loop.create_server(self._new_protocol, sock=sock, backlog=backlog, **self._tls)
            for sock in sockets or []
        ]
        self.started = True
        self._started.set_result(None)

    async def main_loop(self) -> None:
        """Renew the date of responses once a second, until it is time to leave.

        uvicorn looks ten times a second whether it is, and an idle gateway would wake for little else.
        """
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(until_next(1.0)):
                    await self._leaving.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, but serve those the kernel has taken for us: closing would reset them."""
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            listening = [stack.enter_context(socket.socket(fileno=os.dup(it.fileno()))) for it in sockets or []]
            for server in self.servers:
                server.close()
            for sock in listening:
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    while True:
                        connection, _ = sock.accept()
                        await loop.connect_accepted_socket(self._new_protocol, connection, **self._tls)
        await super().shutdown(sockets)
        # Whoever still waits is told so: uvicorn has cancelled tasks only where nobody has forced it to end.
        for protocol in list(self.server_state.connections):
            if isinstance(protocol, HttpProtocol):
                protocol.give_up()
        tasks = set(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_LAST_WORD_S)

    def _new_protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the caller."""
        yield


def _bound_socket(address: ListenAddress) -> socket.socket:
    if address.fd is not None:
        return socket.socket(fileno=address.fd)
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, to = min(found, key=lambda info: info[0] != socket.AF_INET)
        sock = socket.socket(family, kind, protocol)
    except OSError as exc:
        raise _cannot_listen(address, exc) from exc
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(to)
        if not address.reuse_port:
            # Two sockets may be bound to one address as long as neither listens: find out now, not after Redis.
            sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        if address.or_any_port and exc.errno == errno.EADDRINUSE:
            return _bound_socket(replace(address, port=0, or_any_port=False))
        raise _cannot_listen(address, exc) from exc
    return sock


def _cannot_listen(address: ListenAddress, exc: BaseException | None) -> ConfigurationError:
    reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
    return ConfigurationError(f"cannot listen on {address.host}:{address.port}: {reason}")
