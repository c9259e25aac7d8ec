"""The gateway as a process: bind, catch up with the state, serve, leave in order."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import uvicorn

from qserve.background import end, spawn
from qserve.broker.following import Snapshot
from qserve.broker.redis_checks import require_usable_at
from qserve.broker.state import State
from qserve.calls.client import Client
from qserve.errors import BrokerUnavailable, ConfigurationError
from qserve.settings import Settings
from qserve.wire.codec import Codec
from qserve.wire.spec import GatewayInfo, HttpSettings
from qserve_gateway.admin.admin_app import Admin, admin_token
from qserve_gateway.api_keys import load_api_keys
from qserve_gateway.desired_state import Follower
from qserve_gateway.door.limits import Door
from qserve_gateway.door.protocol import HttpProtocol, WebSocketProtocol
from qserve_gateway.durable.call_events import News
from qserve_gateway.durable.durable_requests import CallPages
from qserve_gateway.gateway import Gateway
from qserve_gateway.middlewares import load_middlewares
from qserve_gateway.streaming import OneLinePerCut

logger = logging.getLogger(__name__)

BACKLOG = 2048
_RETRY_S = 0.5
_LARGEST_WEBSOCKET_MESSAGE = 1024 * 1024


@dataclass(frozen=True)
class Tls:
    """As uvicorn's options of these names.

    Attributes:
        ca_certs: Clients have to show a certificate of one of these authorities.
    """

    certfile: str
    keyfile: str | None = None
    keyfile_password: str | None = None
    ca_certs: str | None = None


@dataclass(frozen=True)
class Options:
    """Where to listen, and whom to tell.

    Attributes:
        fd: An inherited socket, bound already; host and port are ignored then.
        reuse_port: Several gateways of this machine share the port.
        ready_file: Gets one line of JSON (`Ready`) once requests are served, or it is clear that they never will be.
        trusted_proxies: Addresses whose X-Forwarded-* headers are believed, as in uvicorn; "" for none.
        tls: How to speak HTTPS, None: HTTP.
        graceful_shutdown_timeout_s: How long requests in flight may take to finish after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    fd: int | None = None
    reuse_port: bool = False
    ready_file: Path | None = None
    trusted_proxies: str = ""
    graceful_shutdown_timeout_s: int = 20
    tls: Tls | None = None


class Ready(msgspec.Struct, omit_defaults=True):
    """What the ready file says: where the gateway is, or why it is not."""

    pid: int
    id: str = ""
    host: str = ""
    port: int = 0
    url: str = ""
    admin_url: str = ""
    error: str = ""


class Server(uvicorn.Server):
    """uvicorn, without its signal handlers: they end the process before the gateway has left in order.

    Args:
        started: Resolved when connections are accepted.
    """

    def __init__(self, config: uvicorn.Config, started: asyncio.Future[None]) -> None:
        super().__init__(config)
        self._started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections."""
        await super().startup(sockets)
        self._started.set_result(None)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, but serve those the kernel has taken for us: closing would reset them."""
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            listeners = [stack.enter_context(socket.socket(fileno=os.dup(it.fileno()))) for it in sockets or []]
            for server in self.servers:
                server.close()
            for listener in listeners:
                listener.setblocking(False)
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    while True:
                        connection, _ = listener.accept()
                        await loop.connect_accepted_socket(self._new_protocol, connection, ssl=self.config.ssl)
        await super().shutdown(sockets)

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


class GatewayProcess:
    """One gateway process, from bind to exit.

    Args:
        options: See there.
        settings: From the environment.
    """

    def __init__(self, options: Options, settings: Settings) -> None:
        self._options = options
        self._settings = settings
        self._client = Client(settings)
        self._news = News(settings.redis_url, settings.keys)
        pages = CallPages(self._client.durable, self._news, debug=settings.debug)
        self._gateway = Gateway(self._client, settings, load_api_keys(settings), pages)
        self._door = Door(settings)
        self._http = HttpSettings()
        self._routes: dict[str, str] = {}

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; a second one cuts off what is still running.

        Raises:
            ConfigurationError: The address, Redis or a middleware cannot be used; the ready file says so too.
        """
        try:
            with listening_socket(self._options) as sock:
                await self._serve(sock)
        except ConfigurationError as exc:
            report(self._options.ready_file, Ready(os.getpid(), error=str(exc)))
            raise

    async def _serve(self, sock: socket.socket) -> None:
        ready = describe(sock, self._client.id, "https" if self._options.tls else "http")
        info = GatewayInfo(id=ready.id, host=socket.gethostname(), pid=ready.pid, url=ready.url)
        follower = Follower(self._client, info, self._apply)
        await _until_redis_answers(partial(asyncio.to_thread, require_usable_at, self._settings.redis_url))
        await _until_redis_answers(self._client.start)
        try:
            await _until_redis_answers(follower.start)
            async with contextlib.AsyncExitStack() as stack:
                await self._serve_and_follow(sock, follower, ready, stack)
        finally:
            await self._door.close()
            await follower.stop()
            await self._news.stop()
            await self._client.stop()
        logger.info("stopped")

    async def _serve_and_follow(
        self, sock: socket.socket, follower: Follower, ready: Ready, stack: contextlib.AsyncExitStack
    ) -> None:
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        logging.getLogger("uvicorn.error").addFilter(OneLinePerCut())
        server = Server(self._uvicorn_config(), started)
        stopping = _stop_signal(server)
        serving = asyncio.create_task(server.serve([sock]))
        self._door.open()
        await asyncio.wait({started, serving}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            raise cannot_listen(self._options, serving.exception())
        await self._start_admin(stack, ready, stopping)
        await follower.announce()  # before anybody is told where we are, and looks us up
        following = asyncio.create_task(follower.run())
        report(self._options.ready_file, ready)
        logger.info("serving on %s", ready.url)
        _spare_the_collector()
        await asyncio.wait({serving, following, stopping}, return_when=asyncio.FIRST_COMPLETED)
        # No deploy waits for a gateway that is leaving; requests in flight still get their replies.
        await end(following)
        follower.leave()
        server.should_exit = True
        await serving
        if not following.cancelled():
            following.result()

    async def _start_admin(
        self, stack: contextlib.AsyncExitStack, ready: Ready, stopping: asyncio.Future[None]
    ) -> None:
        """Start the admin listener, where one is configured; it goes with the stack."""
        if self._settings.admin_port is None:
            return
        token = admin_token(self._settings)
        listen = Options(self._settings.admin_host, self._settings.admin_port)
        sock = stack.enter_context(listening_socket(listen))
        state = State(self._settings.redis_url, self._settings.keys, self._client.signer)
        stack.callback(state.close)
        door = Door(self._settings.model_copy(update={"access_log": "off"}))

        def drain() -> None:
            if not stopping.done():
                stopping.set_result(None)

        admin = Admin(self._settings, state, self._door, self._client, token, drain)
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        server = Server(
            uvicorn.Config(
                admin,
                http=cast(Any, partial(HttpProtocol, door)),
                ws="none",
                interface="asgi3",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                timeout_graceful_shutdown=1,
            ),
            started,
        )
        serving = spawn(server.serve([sock]))

        async def stop() -> None:
            server.should_exit = True
            await serving
            await door.close()

        stack.push_async_callback(stop)
        door.open()
        await started
        ready.admin_url = describe(sock, "").url
        logger.info("admin listener on %s", ready.admin_url)

    def _uvicorn_config(self) -> uvicorn.Config:
        tls = self._options.tls
        config = uvicorn.Config(
            self._gateway,
            http=cast(Any, partial(HttpProtocol, self._door)),
            ws=cast(Any, partial(WebSocketProtocol, self._door)),
            ws_max_size=_LARGEST_WEBSOCKET_MESSAGE,
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=bool(self._options.trusted_proxies),
            forwarded_allow_ips=self._options.trusted_proxies,
            timeout_graceful_shutdown=self._options.graceful_shutdown_timeout_s,
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

    def _apply(self, snapshot: Snapshot) -> None:
        self._gateway.use_deployments(deployed.spec for deployed in snapshot.deployments.values())
        if self._gateway.routes != self._routes:
            self._routes = self._gateway.routes
            logger.info("routes: %s", ", ".join(f"{path} -> {name}" for path, name in self._routes.items()) or "none")
        if snapshot.http != self._http:
            self._http = snapshot.http  # before it is tried: what fails once is not tried at every change
            self._use_http_options(snapshot.http)

    def _use_http_options(self, http: HttpSettings) -> None:
        codec = Codec(allow_pickle=self._client.signer.signs, max_bytes=self._settings.max_value_bytes)
        self._gateway.use_http_options(http.root_path, load_middlewares(http.middlewares, codec))
        logger.info("HTTP options: %d middlewares, root_path %r", len(http.middlewares), http.root_path)


def listening_socket(options: Options) -> socket.socket:
    """A socket bound to where the gateway is to listen.

    Raises:
        ConfigurationError: The port is taken, or the address is not one of this machine's.
    """
    if options.fd is not None:
        return socket.socket(fileno=options.fd)
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        sock = socket.socket(family, kind, protocol)
    except OSError as exc:
        raise cannot_listen(options, exc) from exc
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if options.reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        if not options.reuse_port:
            # Two sockets may be bound to one address as long as neither listens: find out now, not after Redis.
            sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise cannot_listen(options, exc) from exc
    return sock


def cannot_listen(options: Options, exc: BaseException | None) -> ConfigurationError:
    """The one line that says why there is no gateway."""
    reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
    return ConfigurationError(f"cannot listen on {options.host}:{options.port}: {reason}")


def describe(sock: socket.socket, gateway_id: str, scheme: str = "http") -> Ready:
    """Where a bound socket can be reached from this machine."""
    host, port = sock.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return Ready(os.getpid(), gateway_id, host, port, f"{scheme}://{reachable}:{port}")


def report(file: Path | None, ready: Ready) -> None:
    """Tell whoever started the process; a plain file appears whole, a pipe or /dev/fd/N is written to."""
    if file is None:
        return
    line = msgspec.json.encode(ready) + b"\n"
    if file.is_symlink() or (file.exists() and not file.is_file()):
        # Never renamed over: /dev/stdout is a link too, and the machine's.
        with file.open("ab", buffering=0) as pipe:
            pipe.write(line)
        return
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    draft.write_bytes(line)
    draft.replace(file)


def _spare_the_collector() -> None:
    # What exists now stays, and a request leaves no cycles behind: looking for them every 700 objects costs 4 %.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


async def _until_redis_answers(connect: Callable[[], Awaitable[None]]) -> None:
    told = False
    while True:
        try:
            return await connect()
        except BrokerUnavailable as exc:
            if not told:
                logger.warning("%s; trying again until it answers", exc)
            told = True
            await asyncio.sleep(_RETRY_S)


def _stop_signal(server: Server) -> asyncio.Future[None]:
    """A future that the first SIGTERM or SIGINT resolves; the next one cuts off what is still running."""
    loop = asyncio.get_running_loop()
    stopping: asyncio.Future[None] = loop.create_future()

    def stop() -> None:
        if stopping.done():
            server.force_exit = True
        else:
            stopping.set_result(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    return stopping
