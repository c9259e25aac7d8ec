"""The gateway process: it binds its listeners, reads the state, serves, and stops in order."""

import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from qserve.background import end
from qserve.broker.call_news import CallNews
from qserve.broker.instance.change_log import Snapshot
from qserve.broker.instance.state import State
from qserve.broker.server.redis_checks import require_usable_at
from qserve.calls.client import Client
from qserve.errors import BrokerUnavailable, ConfigurationError
from qserve.hooks import GatewayHook, load_hooks
from qserve.settings import Settings
from qserve.this_machine import this_host
from qserve.wire.codec import Codec
from qserve.wire.spec import GatewayInfo, HttpSettings
from qserve_gateway.admin.admin_app import Admin, admin_token
from qserve_gateway.admin.sampling import Sampler
from qserve_gateway.api_keys import load_api_keys
from qserve_gateway.bodies.streaming import OneLinePerCut
from qserve_gateway.desired_state import Follower
from qserve_gateway.door.limits import Door
from qserve_gateway.door.open_files import possible_connections
from qserve_gateway.durable.durable_pages import DurablePages
from qserve_gateway.durable.durable_requests import DurableRequests
from qserve_gateway.gateway import Gateway
from qserve_gateway.listener import ListenAddress, Listener, TlsFiles
from qserve_gateway.middlewares import load_middlewares

logger = logging.getLogger(__name__)

_RETRY_S = 0.5
_MOST_ROUTES_TOLD = 20
_SAME_S = 1.0
"""Signals within this time count as one where the parent has died: that is told once for each thread that it had."""


@dataclass(frozen=True)
class GatewayOptions:
    """Where a gateway listens, and whom it tells.

    Attributes:
        ready_file: Gets one line of JSON (`Ready`) once requests are served, or it is clear that they never will be.
        trusted_proxies: Addresses whose X-Forwarded-* headers are believed, as in uvicorn; "" for none.
        tls: How to speak HTTPS; None for HTTP.
        graceful_shutdown_timeout_s: How long requests in flight may take to finish after SIGTERM.
    """

    address: ListenAddress
    ready_file: Path | None = None
    trusted_proxies: str = ""
    graceful_shutdown_timeout_s: int = 20
    tls: TlsFiles | None = None


class Ready(msgspec.Struct, omit_defaults=True):
    """What the ready file says: where the gateway is, or why it is not."""

    pid: int
    id: str = ""
    host: str = ""
    port: int = 0
    url: str = ""
    admin_url: str = ""
    error: str = ""


class GatewayProcess:
    """One gateway process, from bind to exit.

    Args:
        options: Where it listens, and whom it tells.
        settings: From the environment.

    Attributes:
        listeners: Bound, started and stopped in this order; before `run` there may be added to them.
    """

    def __init__(self, options: GatewayOptions, settings: Settings) -> None:
        self._options = options
        self._settings = settings
        self._client = Client(settings)
        self._news = CallNews(settings.redis_url, settings.keys)
        self._leaving = asyncio.Event()
        durable = DurableRequests(self._client, self._leaving, debug=settings.debug)
        pages = DurablePages(self._client, self._news, self._leaving, debug=settings.debug)
        hooks = load_hooks(settings.hook_paths, GatewayHook)
        keys = load_api_keys(settings)
        self._gateway = Gateway(self._client, settings, keys, durable, pages, hooks, self._leaving)
        self._http = HttpSettings()
        self._routes: dict[str, str] = {}
        self._stopping: asyncio.Future[None]
        self._parent = os.getppid()
        most = possible_connections(settings.http_max_connections)
        door = Door(settings.model_copy(update={"http_max_connections": most}))
        self._public = Listener(
            self._gateway,
            options.address,
            door,
            websockets=True,
            tls=options.tls,
            trusted_proxies=options.trusted_proxies,
            graceful_shutdown_timeout_s=options.graceful_shutdown_timeout_s,
        )
        self._state = State(settings.redis_url, settings.keys, self._client.signer)
        self._sampler = Sampler(self._state, self._client.id)
        self._admin = self._admin_listener(door)
        # The admin listener leaves last: it tells how those before it are getting on.
        self.listeners: tuple[Listener, ...] = (self._public, *([self._admin] if self._admin else []))

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; a second one cuts off what is still running.

        Raises:
            ConfigurationError: An address, Redis or a middleware cannot be used; the ready file says so too.
        """
        self._stopping = asyncio.get_running_loop().create_future()
        try:
            with contextlib.ExitStack() as stack:
                for listener in self.listeners:
                    stack.enter_context(listener.bind())
                await self._serve()
        except ConfigurationError as exc:
            report(self._options.ready_file, Ready(os.getpid(), error=str(exc)))
            raise

    def leave(self) -> None:
        """Make `run` end as SIGTERM does."""
        if not self._stopping.done():
            self._stopping.set_result(None)

    async def _serve(self) -> None:
        ready = Ready(
            *(os.getpid(), self._client.id, self._public.host, self._public.port),
            self._settings.public_url.rstrip("/") or self._public.url,
            admin_url=self._admin.url if self._admin else "",
        )
        host, machine = socket.gethostname(), this_host()
        info = GatewayInfo(id=ready.id, host=host, pid=ready.pid, url=ready.url, machine=machine)
        follower = Follower(self._client, info, self._apply)
        logging.getLogger("uvicorn.error").addFilter(OneLinePerCut())
        self._listen_to_signals()
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._disconnect, follower)
            for listener in reversed(self.listeners):
                stack.push_async_callback(listener.stop)
            connecting = asyncio.create_task(self._connect(follower))
            await asyncio.wait({connecting, self._stopping}, return_when=asyncio.FIRST_COMPLETED)
            if connecting.done():
                connecting.result()
                await self._serve_and_follow(follower, ready)
            self._leaving.set()
            await end(connecting)
        logger.info("stopped")

    async def _connect(self, follower: Follower) -> None:
        """Find Redis, and what is deployed, however long that takes.

        Meanwhile requests are told so: whether this process is well depends on nobody else.
        """
        for step in (self._require_usable_redis, self._client.start, follower.start):
            told = False
            while True:
                try:
                    await step()
                    break
                except BrokerUnavailable as exc:
                    if not told:
                        why = str(exc).rstrip(".")
                        logger.warning("%s. Trying again until it answers; requests get 503 meanwhile.", why)
                    told = True
                await self._listen()
                await asyncio.sleep(_RETRY_S)

    async def _require_usable_redis(self) -> None:
        await asyncio.to_thread(require_usable_at, self._settings.redis_url)

    async def _listen(self) -> None:
        for listener in self.listeners:
            if listener.serving is None:
                await listener.start()

    async def _disconnect(self, follower: Follower) -> None:
        await follower.stop()
        await self._news.stop()
        await self._client.stop()
        self._state.close()

    async def _serve_and_follow(self, follower: Follower, ready: Ready) -> None:
        await self._listen()
        await follower.announce()  # before anybody is told where we are, and looks us up
        following, sampling = asyncio.create_task(follower.run()), asyncio.create_task(self._sampler.run())
        report(self._options.ready_file, ready)
        logger.info("serving on %s", ready.url)
        if ready.admin_url:
            logger.info("admin listener on %s", ready.admin_url)
        _spare_the_collector()
        serving = {listener.serving for listener in self.listeners if listener.serving is not None}
        await asyncio.wait({*serving, following, self._stopping}, return_when=asyncio.FIRST_COMPLETED)
        self._leaving.set()
        # No deploy waits for a gateway that is leaving; requests in flight still get their replies.
        await end(following, sampling)
        follower.leave()
        if self._admin is not None and os.getppid() != self._parent:
            await self._admin.stop()  # another node starts another gateway, whose admin listener takes this port
        if not following.cancelled():
            following.result()

    def _admin_listener(self, door: Door) -> Listener | None:
        settings = self._settings
        if settings.admin_port is None:
            return None
        app = Admin(settings, self._state, door, self._client, admin_token(settings), self.leave)
        address = ListenAddress(settings.admin_host, settings.admin_port, or_any_port=settings.console_open)
        return Listener(app, address, Door(settings, has_log=False))

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        told_at = math.inf

        def stop() -> None:
            nonlocal told_at
            is_same = os.getppid() != self._parent and loop.time() - told_at < _SAME_S
            if self._stopping.done() and not is_same:
                for listener in self.listeners:
                    listener.cut_off()
            told_at = min(told_at, loop.time())
            self.leave()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)

    def _apply(self, snapshot: Snapshot) -> None:
        self._sampler.deployments = tuple(snapshot.deployments)
        self._gateway.use_deployments(
            (deployed.spec for deployed in snapshot.deployments.values()),
            asleep=frozenset(name for name, deployed in snapshot.deployments.items() if deployed.asleep),
        )
        if self._gateway.routes != self._routes:
            before, self._routes = self._routes, self._gateway.routes
            _tell_of_routes(before, self._routes)
        if snapshot.http != self._http:
            self._http = snapshot.http  # before it is tried: what fails once is not tried at every change
            self._use_http_options(snapshot.http)

    def _use_http_options(self, http: HttpSettings) -> None:
        codec = Codec(allow_pickle=self._client.signer.signs, max_bytes=self._settings.max_value_bytes)
        self._gateway.use_http_options(http.root_path, load_middlewares(http.middlewares, codec))
        logger.info("HTTP options: %d middlewares, root_path %r", len(http.middlewares), http.root_path)


def _tell_of_routes(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    changed = [f"{path} -> {name}" for path, name in now.items() if before.get(path) != name]
    gone = [f"{path} is gone" for path in before.keys() - now.keys()]
    told = [*changed, *gone][:_MOST_ROUTES_TOLD]
    more = len(changed) + len(gone) - len(told)
    logger.info("routes: %s%s", ", ".join(told), f", and {more} more" if more else "")


def report(file: Path | None, ready: Ready) -> None:
    """Write the ready file: a plain file appears whole, and a pipe or /dev/fd/N is written to."""
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
