"""Instances for tests of applications, which leave nothing behind.

@pytest.fixture(scope="session")
def served():
    with qserve.testing.instance() as served:
        yield served
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qserve import serve
from qserve.deployments.http_options import HTTPOptions
from qserve.deployments.local_instance import find_record, find_settings
from qserve.settings import Settings

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


@contextlib.contextmanager
def instance(http_options: HTTPOptions | Mapping[str, Any] | None = None) -> Iterator[TestInstance]:
    """Start an instance, which `serve` and the handles of this process use until the end of the block; then stop it.

    It has its own Valkey, key and port, so that tests can run side by side in several processes.

    Args:
        http_options: As for `serve.start`. Without them, the port is any free one.
    """
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
