"""For tests of applications: deployments in the process of the test, and whole instances that leave nothing behind.

`local` takes milliseconds and shows whether the application does what it should; `instance` takes a second or two and
shows whether it does so in processes of its own.
"""

import contextlib
import functools
import os
import shutil
import tempfile
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qserve import serve
from qserve.applications.app_import import import_target
from qserve.calls.durable_ref import CallStatus
from qserve.calls.handle import DeploymentHandle
from qserve.deployments.binding import Application
from qserve.deployments.deployment import Deployment
from qserve.deployments.driver import THIS_PROCESS
from qserve.deployments.http_options import HTTPOptions
from qserve.deployments.in_process import serving_here
from qserve.deployments.local_instance import find_record, find_settings
from qserve.errors import ConfigurationError
from qserve.settings import Settings

if TYPE_CHECKING:
    from starlette.testclient import TestClient

_INSTANCE_VARIABLES = ("QSERVE_REDIS_URL", "QSERVE_SECRET", "QSERVE_NAMESPACE", "QSERVE_RUNTIME_DIR")


@dataclass(frozen=True)
class TestInstance:
    """A running instance.

    Attributes:
        url: The URL of its gateway, "" if it has none.
        settings: Settings with which a process reaches it.
    """

    __test__ = False  # pytest would take it for a class of tests because of its name

    url: str
    settings: Settings

    def clear(self) -> None:
        """Delete every deployment."""
        for deployment in serve.list_deployments().values():
            deployment.delete()


class _LocalCalls(Protocol):
    def statuses(self) -> list[CallStatus]: ...

    def pass_time(self, seconds: float) -> None: ...


@dataclass(frozen=True)
class LocalServing:
    """Deployments that run in this process.

    Attributes:
        app: An ASGI application that serves the deployments that have a route.
        handle: The handle of what `local` was given; None for several deployments.
    """

    app: Callable[..., Awaitable[None]]
    handle: DeploymentHandle[Any] | None
    _calls: "_LocalCalls"

    @functools.cached_property
    def client(self) -> "TestClient":
        """An HTTP client for `app`, Starlette's `TestClient`. What user code raises is raised by its methods."""
        try:
            with warnings.catch_warnings():  # of httpx, which some versions of Starlette would like to be httpx2
                warnings.simplefilter("ignore")
                from starlette.testclient import TestClient  # noqa: PLC0415
        except RuntimeError as exc:
            raise ConfigurationError("the HTTP client of qserve.testing.local needs httpx: pip install httpx") from exc
        return TestClient(self.app)

    def durable_calls(self) -> list[CallStatus]:
        """How each durable call is doing, in the order in which they were submitted; dead letters have the state
        "dead"."""
        return self._calls.statuses()

    def pass_time(self, seconds: float) -> None:
        """Let delays and schedules see so much time pass: calls that are due within it begin now.

        A schedule makes one call, however many of its moments pass at once.
        """
        self._calls.pass_time(seconds)


@contextlib.contextmanager
def local(target: Application[Any] | Deployment[Any] | Sequence[Deployment[Any]] | str) -> Iterator[LocalServing]:
    """Run deployments in this process until the end of the block, without Redis and without other processes.

    `serve.run`, `deploy`, `serve.get_deployment` and handles of this process mean these deployments meanwhile. Each has
    one replica. Arguments, results and errors are turned into bytes and back as on their way to a replica, so what
    cannot be sent fails here, too. Durable calls are kept in the memory of this process; one that failed and has
    retries left runs again at once.

    Args:
        target: An application (`Deployment.bind(...)`), a deployment, several deployments, or "MODULE" or "MODULE:NAME"
            as for `qserve run`.

    Raises:
        RuntimeError: A constructor raised; its error is the cause.
        ConfigurationError: `qserve[workers]` is not installed, or the module cannot be imported.
    """
    with serving_here("qserve.testing.local") as app:
        handle = serve.run(_named(target) if isinstance(target, str) else target)
        yield LocalServing(app, handle, app.calls)


def _named(text: str) -> Application[Any] | Deployment[Any] | Sequence[Deployment[Any]]:
    found = import_target(text)
    return found[0] if isinstance(found, list) and len(found) == 1 else found


@contextlib.contextmanager
def instance(http_options: HTTPOptions | Mapping[str, Any] | None = None) -> Iterator[TestInstance]:
    """Start an instance, which `serve` and the handles of this process use until the end of the block; then stop it.

    It has its own Valkey, key and port, so that tests can run side by side in several processes.

    Args:
        http_options: As for `serve.start`. Without them, the port is any free one.

    Raises:
        ConfigurationError: `local` is in use at the moment.
    """
    if THIS_PROCESS.is_given:
        raise ConfigurationError(
            "An instance cannot be started while deployments run in this process, as qserve.testing.local and the "
            "fixture qserve_local let them: start it before, or end that first."
        )
    options = http_options or {"port": 0}
    with _own_environment():
        serve.start(http_options=options)
        try:
            settings = find_settings()
            record = find_record(settings.namespace)
            yield TestInstance(record.gateway_url if record else "", settings)
        finally:
            serve.shutdown()


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    kept = {name: os.environ.pop(name, None) for name in _INSTANCE_VARIABLES}
    folder = tempfile.mkdtemp(prefix="qs-")  # short, because the path of a socket, which begins with it, is limited
    os.environ["QSERVE_RUNTIME_DIR"] = folder
    try:
        yield
    finally:
        del os.environ["QSERVE_RUNTIME_DIR"]
        os.environ.update({name: value for name, value in kept.items() if value is not None})
        shutil.rmtree(folder, ignore_errors=True)
