"""The instance that this process deploys to: found on this machine or in the environment, or started."""

import atexit
import contextlib
import logging
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from qserve.broker.instance.state import State
from qserve.broker.server.redis_checks import require_usable_at
from qserve.calls import process_client
from qserve.calls.handles.base_handle import handle_from_wire
from qserve.deployments import deploying, local_instance
from qserve.deployments.http_options import HTTPOptions
from qserve.deployments.in_process import serving_here
from qserve.durable.schedules import Schedules
from qserve.errors import NoInstanceError
from qserve.settings import Settings
from qserve.wire.codec import Codec
from qserve.wire.messages import Signer
from qserve.wire.spec import DeploymentSpec, HttpSettings

logger = logging.getLogger(__name__)


_NAMED_OUTPUT: Final = {"QSERVE_NAMES_OUTPUT": "1"}


class ConnectedInstance:
    """A running instance, for a process that deploys to it. Thread-safe."""

    def __init__(self, settings: Settings, state: State | None = None) -> None:
        self.settings = settings
        self.state = state or State(settings.redis_url, settings.keys, Signer(settings.secrets))
        self.codec = make_codec(settings, signs=self.state.signer.signs)
        self.schedules = Schedules(self.state)

    def put(self, spec: DeploymentSpec) -> deploying.Goal:
        """Make a spec the desired state of its name; wait for the goal to see it served."""
        return deploying.deploy(self.state, spec)

    def put_declared_schedules(self, names: Iterable[str]) -> None:
        """Put the schedules of these deployments that modules have declared at their top level."""
        self.schedules.put_declared(frozenset(names), self.codec)

    def delete(self, name: str) -> None:
        """Delete a deployment and wait until it is gone."""
        deploying.delete(self.state, name)

    def url_of(self, route_prefix: str) -> str | None:
        """The URL of a route; None where no gateway serves HTTP."""
        http = self.state.get_http()
        if http.root_url:
            return http.root_url.rstrip("/") + route_prefix
        for gateway in self.state.observed.gateways().values():
            return gateway.url.rstrip("/") + http.root_path.rstrip("/") + route_prefix
        return None

    def set_http(self, http: HttpSettings) -> None:
        """Change the HTTP settings of all gateways, and wait until they have taken them over."""
        if self.state.get_http() != http:
            deploying.wait_for_gateways(self.state, self.state.set_http(http))

    def clear(self) -> None:
        """Delete every deployment."""
        found = self.state.list()
        for name in found:  # first all of them, so that their replicas leave side by side
            self.state.delete(name)
        for deployed in found.values():
            deploying.finish_deleting(self.state, deployed.spec)

    def close(self) -> None:
        """Close the connections."""
        self.state.close()


class Driver:
    """Finds the instance of this process, or starts one. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._connected: ConnectedInstance | None = None
        self._local: local_instance.LocalInstance | None = None
        self._given: ConnectedInstance | None = None
        self._here: ConnectedInstance | None = None
        self._leaving_here = contextlib.ExitStack()

    @contextlib.contextmanager
    def using(self, instance: ConnectedInstance) -> Iterator[None]:
        """A block in which this instance is the one of this process, and none is looked for or started."""
        before, self._given = self._given, instance
        try:
            yield
        finally:
            self._given = before

    @property
    def is_given(self) -> bool:
        """Whether this is a block in which no instance is started; see `using`."""
        return self._given is not None and self._given is not self._here

    def serve_here(self) -> ConnectedInstance:
        """Let deployments run in this process from now on, until `start` or `shutdown`.

        Raises:
            ConfigurationError: `qserve[workers]` is not installed.
        """
        if self._given is None:
            self._leaving_here.enter_context(serving_here("_local_testing_mode"))
            self._here = self._given
        return self.current()

    def current(self) -> ConnectedInstance:
        """The instance of this process.

        Raises:
            NoInstanceError: No instance is running.
        """
        return self._given or self._connect(local_instance.find_settings())

    def start(
        self,
        options: HTTPOptions,
        *,
        detached: bool,
        wait: bool = True,
        shown_with: Mapping[str, str] | None = None,
    ) -> ConnectedInstance:
        """The instance of this process; one is started if none is running.

        Args:
            options: How to serve HTTP, for an instance that is started. A running one keeps its own, with a warning.
            detached: Whether an instance that is started outlives this process.
            wait: Return when HTTP is served; otherwise as soon as deployments can be made.
            shown_with: The processes of an instance that is started write to the standard error of this process, and
                find this in their environment; None: they write to a file.

        Raises:
            ValueError: The address cannot be listened on.
            ConfigurationError: The instance cannot be started, or the Redis of QSERVE_REDIS_URL cannot be used.
            BrokerUnavailable: The Redis of QSERVE_REDIS_URL does not answer.
        """
        self._stop_serving_here()
        if self._given is not None:
            return self._given
        settings = Settings()
        if settings.redis_url:
            require_usable_at(settings.redis_url)
        with self._lock, local_instance.start_lock(settings.namespace):
            try:
                running = self.current()
                if self._is_served(running, settings):
                    if wait:
                        self.wait_until_ready()
                    _warn_of_other_options(running, options)
                    return running
            except NoInstanceError:
                pass
            return self._launch(settings, options, detached=detached, wait=wait, shown_with=shown_with)

    def wait_until_ready(self) -> None:
        """Wait until the instance serves HTTP, if it is one on this machine."""
        if self._given is not None:
            return
        own = self._own(self.current())
        if own is not None:
            own.wait_until_ready()
        elif not Settings().redis_url:
            local_instance.wait_until_ready(Settings().namespace)

    def shutdown(self) -> None:
        """Delete all deployments and stop the processes of the instance; harmless where there is none."""
        if self._given is not None:
            self._given.clear()
            self._stop_serving_here()
            return
        with self._lock:
            try:
                running = self.current()
            except NoInstanceError:
                self._forget()
                return
            record = local_instance.find_record(running.settings.namespace)
            if record is not None and record.redis_url != running.settings.redis_url:
                record = None  # another instance on this machine
            embedded = record is not None and not Settings().redis_url and _is_embedded(record)
            if not embedded:
                running.clear()
            own = self._own(running)
            self._forget()
            if own is not None:
                own.stop()
                self._local = None
            elif record is not None:
                local_instance.stop_instance(record)

    @property
    def own_log_file(self) -> Path | None:
        """The log of the instance that this process has started, unless that outlives it."""
        return self._local.log_file if self._local is not None and not self._local.detached else None

    def stop_own(self) -> None:
        """Stop the instance that this process has started, if there is one."""
        if self._local is not None:
            self._stop_at_exit(self._local)

    def _stop_serving_here(self) -> None:
        if self._here is not None and self._given is self._here:
            self._here = None
            self._leaving_here.close()

    def _own(self, running: ConnectedInstance) -> local_instance.LocalInstance | None:
        """The instance in use, if this process started it; the environment may name another one by now."""
        started = self._local
        return started if started is not None and started.settings.redis_url == running.settings.redis_url else None

    def _connect(self, settings: Settings) -> ConnectedInstance:
        with self._lock:
            known = self._connected
            if known is None or known.settings != settings:
                self._forget(unless=settings)
                self._connected = known = ConnectedInstance(settings)
            return known

    def _forget(self, unless: Settings | None = None) -> None:
        process_client.close_current_client(unless=unless)
        if self._connected is not None:
            self._connected.close()
            self._connected = None

    def _is_served(self, running: ConnectedInstance, settings: Settings) -> bool:
        """Whether it has nodes or gateways; the Redis that the environment names may be all there is."""
        return not settings.redis_url or bool(running.state.observed.nodes()) or bool(running.state.observed.gateways())

    def _launch(
        self,
        settings: Settings,
        options: HTTPOptions,
        *,
        detached: bool,
        wait: bool,
        shown_with: Mapping[str, str] | None,
    ) -> ConnectedInstance:
        http = options.settings(make_codec(settings, signs=bool(settings.secret) or not settings.redis_url))
        if options.serves:
            local_instance.check_address(str(options.host), options.port)
        launch = local_instance.LaunchOptions(
            host=options.host if options.serves else None,
            port=options.port,
            http=options.of_processes(),
            detached=detached,
            log_to_stderr=shown_with is not None,
            environment={**options.environment(), **(shown_with or ({} if detached else _NAMED_OUTPUT))},
            gateway_arguments=options.gateway_arguments(),
        )
        self._local = started = local_instance.launch(settings, launch)
        if started.log_file is not None:
            _tell_of(started)
        if not detached:
            atexit.register(self._stop_at_exit, started)
        started.wait_for_redis()
        connected = self._connect(started.settings)
        connected.set_http(http)
        if wait:
            started.wait_until_ready()
        return connected

    def _stop_at_exit(self, started: local_instance.LocalInstance) -> None:
        if self._local is started:
            self._local = None
            process_client.close_current_client()
            with contextlib.suppress(KeyboardInterrupt):  # it has been killed then
                started.stop()


THIS_PROCESS: Final = Driver()
process_client.set_settings_finder(local_instance.find_settings)


def make_codec(settings: Settings, *, signs: bool) -> Codec:
    """The codec of specs and HTTP settings."""
    return Codec(allow_pickle=signs, max_bytes=settings.max_value_bytes, make_handle=handle_from_wire)


def _tell_of(started: local_instance.LocalInstance) -> None:
    """Say on standard error where the log of an instance is, which few scripts have a handler for."""
    if logging.getLevelNamesMapping().get(started.settings.log_level.upper(), logging.INFO) <= logging.INFO:
        sys.stderr.write(f"qserve: an instance starts (pid {started.pid}). Its log: {started.log_file}\n")
        sys.stderr.flush()


def _is_embedded(record: local_instance.InstanceRecord) -> bool:
    return record.folder != "" and record.folder in record.redis_url


def _warn_of_other_options(running: ConnectedInstance, options: HTTPOptions) -> None:
    record = local_instance.find_record(running.settings.namespace)
    if not options.model_fields_set:
        return
    before: Mapping[str, object] = record.http if record is not None else {}
    different = {name for name, value in options.of_processes().items() if name in before and before[name] != value}
    http, wanted = running.state.get_http(), options.settings(running.codec)
    shared = ("root_path", "root_url", "middlewares")
    different |= {name for name in shared if getattr(http, name) != getattr(wanted, name)}
    different &= options.model_fields_set
    if different:
        logger.warning(
            "The running instance was started with other http_options. It keeps them, and these are ignored: %s. "
            "Call serve.shutdown() first to start one with yours.",
            ", ".join(sorted(different)),
        )
