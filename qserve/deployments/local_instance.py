"""The instance on this machine: finding it, starting one, and stopping it.

An instance is a process (`python -m qserve_workers.instance_process`) that owns everything else: the embedded Valkey
and the node, which has the gateway and the Celery workers. A file tells other processes of the same user where it is.
"""

import contextlib
import fcntl
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from qserve.broker.instance.state import State
from qserve.broker.server import embedded
from qserve.deployments.data_folder import DataFolder
from qserve.deployments.head_start import FOR_SOME, PROGRAM, HeadStart
from qserve.deployments.log_files import log_tail, new_log_file
from qserve.errors import BrokerUnavailable, ConfigurationError, NoInstanceError
from qserve.settings import Settings
from qserve.this_machine import is_running, runtime_folder, started_at
from qserve.wire.messages import Signer

NO_INSTANCE = (
    "There is no instance running on this machine. Please call `serve.start(detached=True)` or run `qserve run` to "
    "start one, or set QSERVE_REDIS_URL to the Redis server of one that runs elsewhere."
)
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 40.0
_EXIT_S = 2.0
_POLL_S = 0.005

Found = TypeVar("Found")


class InstanceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the instance file says. It holds the signing key, so only its user may read it.

    Attributes:
        pid: The process that holds it together.
        started: When that was started, as `started_at` has it; "" where it was not told.
        node: The id of its node.
        folder: The folder of its sockets and logs.
        ready: Whether its gateway listens, where it has one. One can deploy to it before.
        gateway_url: The URL of its gateway, "" where it has none.
        console_url: The URL of its console, "" where it has none.
        http: The address among the http_options that it was started with.
        detached: Whether it outlives the process that started it.
        log_file: The file to which its processes log; "" where that is the standard error of `qserve run`.
    """

    namespace: str
    redis_url: str
    secret: str
    pid: int
    folder: str
    started: str = ""
    node: str = ""
    ready: bool = True
    gateway_url: str = ""
    console_url: str = ""
    http: dict[str, str | int | float | None] = {}
    detached: bool = False
    log_file: str = ""


# Finding


def find_settings() -> Settings:
    """The settings of the instance that the environment names, or else of the instance on this machine.

    Raises:
        NoInstanceError: The environment names none, and none runs on this machine.
    """
    settings = Settings()
    if settings.redis_url:
        return settings
    record = find_record(settings.namespace)
    if record is None:
        raise NoInstanceError(NO_INSTANCE)
    return settings.model_copy(update={"redis_url": record.redis_url, "secret": settings.secret or record.secret})


def find_record(namespace: str) -> InstanceRecord | None:
    """The running instance of a namespace on this machine; None where there is none."""
    try:
        record = msgspec.json.decode(record_path(namespace).read_bytes(), type=InstanceRecord)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    # After a power failure, or in a container that is started again, another process may have its number.
    is_another = record.started not in ("", started_at(record.pid))
    return record if is_running(record.pid) and not is_another else None


def record_path(namespace: str) -> Path:
    """The path of the instance file of a namespace."""
    return runtime_folder() / f"{namespace}.json"


# Starting and stopping


@dataclass(frozen=True)
class LaunchOptions:
    """How to start an instance.

    Attributes:
        host, port: The address on which the gateway listens. Host None means no gateway, and port 0 any free port.
        http: The part of the http_options that the instance file keeps.
        detached: Whether it outlives this process.
        gateway_workers: How many gateways share the port.
        gateway_arguments: Further arguments of their command lines.
        log_to_stderr: Whether its processes log to the standard error of this process, and not to a file.
        environment: What they find in their environment besides that of this process.
        head_start: A process that was started ahead to be the one of this instance, if there is one.
        data: The folder in which its embedded server keeps its data; None: nowhere.
    """

    host: str | None
    port: int
    http: dict[str, str | int | float | None]
    detached: bool = False
    log_to_stderr: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    gateway_workers: int = 1
    gateway_arguments: tuple[str, ...] = ()
    head_start: HeadStart | None = None
    data: Path | None = None


class LocalInstance:
    """An instance that this process has started.

    Attributes:
        log_file: The file to which its processes log; None where that is the standard error of this process.
    """

    def __init__(
        self,
        settings: Settings,
        process: "subprocess.Popen[bytes]",
        folder: Path,
        *,
        log_file: Path | None,
        detached: bool,
    ) -> None:
        self.settings = settings
        self.detached = detached
        self.pid = process.pid
        self.log_file = log_file
        self._process = process
        self._folder = folder
        self._driver = os.getpid()

    def wait_for_redis(self) -> None:
        """Wait until its Redis answers and its node can be deployed to.

        Raises:
            ConfigurationError: It has ended, or this takes too long.
        """
        path = embedded.socket_path(self._folder)
        if self.settings.redis_url == embedded.redis_url(self._folder):
            self._wait(lambda: _accepts(path) or None, "Redis")
        state = State(self.settings.redis_url, self.settings.keys, Signer(self.settings.secrets))
        with contextlib.closing(state):
            self._wait(lambda: self._has_node(state) or None, "the node")

    def wait_until_ready(self) -> InstanceRecord:
        """Wait until its gateway listens.

        Raises:
            ConfigurationError: It has ended, or this takes too long.
        """
        return self._wait(self._own_record, "the gateway")

    def stop(self) -> None:
        """Stop all of its processes; calls that run are finished first. Ctrl-C while it waits ends them at once."""
        if os.getpid() == self._driver:  # a process that was forked off must not stop it
            _stop(self.pid, lambda: self._process.poll() is not None)

    def _has_node(self, state: State) -> bool:
        record = self._record()
        return record is not None and record.node in state.observed.nodes()

    def _own_record(self) -> InstanceRecord | None:
        record = self._record()
        return record if record is not None and record.ready else None

    def _record(self) -> InstanceRecord | None:
        record = find_record(self.settings.namespace)
        return record if record is not None and record.pid == self.pid else None

    def _wait(self, look: Callable[[], Found | None], what: str) -> Found:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(BrokerUnavailable):  # it reads its data, or has ended
                found = look()
                if found is not None:
                    return found
            if self._process.poll() is not None:
                raise ConfigurationError(f"The instance ended while it was starting.{self._log_tail()}")
            time.sleep(_POLL_S)
        said = self._log_tail()
        self.stop()
        raise ConfigurationError(
            f"The instance was stopped: {what} was not ready within {START_TIMEOUT_S:.0f} s.{said}"
        )

    def _log_tail(self) -> str:
        if self.log_file is None:
            return " Its messages are above."
        with contextlib.suppress(OSError):
            return f" Its log, {self.log_file}, ends with:\n{log_tail(self.log_file)}"
        return f" Its log was {self.log_file}, which cannot be read."


def launch(settings: Settings, options: LaunchOptions) -> LocalInstance:
    """Start an instance: on the Redis of `settings`, or on an embedded server with a key of its own.

    To be called under `start_lock`. It returns once the process runs; the `LocalInstance` tells how far that is.

    Raises:
        ConfigurationError: There is no server to run, no folder that can be used, or something is not installed.
    """
    require_extras(serves_http=options.host is not None)
    secret, data = settings.secret, DataFolder(options.data) if options.data is not None else None
    if not settings.redis_url:
        embedded.find_server()  # fails here if there is none: easier to read than in the log
        secret = data.prepare(secret) if data is not None else secret or secrets.token_hex(32)
    elif data is not None:
        raise ConfigurationError(
            "A folder for data is for the server that an instance starts for itself, but QSERVE_REDIS_URL or "
            "--redis-url names one that runs already. Nothing was started: leave out one of the two."
        )
    folder = _new_folder(settings.namespace)
    flags = ["--exact", "--instance-file", str(record_path(settings.namespace)), "--folder", str(folder)]
    if not settings.redis_url:
        settings = settings.model_copy(update={"redis_url": embedded.redis_url(folder), "secret": secret})
        flags += ["--embedded", *(["--data", str(data.path)] if data is not None else [])]
    if options.host is not None:
        flags += ["--gateway", "--host", options.host, "--port", str(options.port)]
        flags += ["--gateway-workers", str(options.gateway_workers)]
        flags += [f"--gateway-argument={argument}" for argument in options.gateway_arguments]
    if not options.detached:
        flags += ["--owner", str(os.getpid())]
    flags += [f"--import={name}" for name in FOR_SOME if name in sys.modules]
    flags += ["--http", msgspec.json.encode(options.http).decode()]
    log = None if options.log_to_stderr else new_log_file(runtime_folder(), settings.namespace)
    flags += ["--log-file", str(log)] if log is not None else []
    process = _spawn(settings, flags, options, log)
    return LocalInstance(settings, process, folder, log_file=log, detached=options.detached)


def wait_until_ready(namespace: str) -> InstanceRecord | None:
    """Wait until an instance that another process is starting serves HTTP; None when it has ended."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while (record := find_record(namespace)) is not None and not record.ready and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return record


def stop_instance(record: InstanceRecord) -> None:
    """Stop an instance that another process has started."""
    # Its file is removed last. The process itself may stay as a zombie where its parent does not look after it.
    _stop(record.pid, lambda: not is_running(record.pid) or not record_path(record.namespace).exists())
    deadline = time.monotonic() + _EXIT_S
    while is_running(record.pid) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


@contextlib.contextmanager
def start_lock(namespace: str) -> Iterator[None]:
    """Hold this while starting an instance, so that two processes do not start two."""
    with (runtime_folder() / f"{namespace}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_address(host: str, port: int) -> None:
    """Check that an address can be listened on: an error here is easier to see than one in the log of the gateway.

    Raises:
        ValueError: The address cannot be listened on.
    """
    listening_socket(host, port, backlog=None).close()


def listening_socket(host: str, port: int, *, backlog: int | None = 2048) -> socket.socket:
    """A socket that listens on an address; with `backlog=None` it is only bound.

    Raises:
        ValueError: The address cannot be listened on.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        with contextlib.ExitStack() as stack:
            made = stack.enter_context(socket.socket(family, kind, protocol))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            if backlog is not None:
                made.listen(backlog)
            stack.pop_all()
            return made
    except OSError as exc:
        raise ValueError(
            f"Failed to bind to '{host}:{port}' ({exc.strerror or exc}). "
            "Please make sure your http-host and http-port are specified correctly."
        ) from exc


def _spawn(settings: Settings, flags: list[str], options: LaunchOptions, log: Path | None) -> "subprocess.Popen[bytes]":
    environment = {
        **os.environ,
        **options.environment,
        "QSERVE_REDIS_URL": settings.redis_url,
        "QSERVE_SECRET": settings.secret,
        "QSERVE_NAMESPACE": settings.namespace,
    }
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("ab")).fileno() if log else 2
        if options.head_start is not None:
            process = options.head_start.begin(flags, environment, output)
            if process is not None:
                return process
        return subprocess.Popen(
            [*PROGRAM, *flags],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that Ctrl-C reaches this process alone, which stops the rest in order
        )


def require_extras(*, serves_http: bool) -> None:
    """Fail here, and not in a process whose end would have to be explained.

    Raises:
        ConfigurationError: An instance needs packages that are not installed.
    """
    needed = ["celery", "fastapi", "uvloop", *(["httptools", "uvicorn"] if serves_http else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"An instance on this machine needs packages that are not installed ({', '.join(missing)}), so nothing was "
            "started: pip install 'qserve[all]'"
        )


def _new_folder(namespace: str) -> Path:
    for left in runtime_folder().glob(f"{namespace}~*"):  # by instances that were killed; none is running now
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{namespace}~", dir=runtime_folder()))
    if len(str(embedded.socket_path(folder))) > embedded.SOCKET_PATH_LIMIT:
        folder.rmdir()
        return Path(tempfile.mkdtemp(prefix="qs-", dir="/tmp"))
    return folder


def _stop(pid: int, has_ended: Callable[[], bool]) -> None:
    """End a process by SIGTERM; when that takes too long, or on Ctrl-C, by SIGKILL, which takes its children along."""
    try:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while not has_ended() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    except ProcessLookupError:
        return
    finally:
        if not has_ended():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0
