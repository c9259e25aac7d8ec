"""For tests of applications: an instance of their own, which leaves nothing behind.

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
        url: Where its gateway listens, "" without one.
        settings: What a process needs to reach it.
    """

    __test__ = False  # not a test class, whatever pytest thinks of its name

    url: str
    settings: Settings

    def clear(self) -> None:
        """Delete every deployment."""
        for deployment in serve.list_deployments().values():
            deployment.delete()


@contextlib.contextmanager
def instance(http_options: HTTPOptions | Mapping[str, Any] | None = None) -> Iterator[TestInstance]:
    """Start an instance that `serve` and handles of this process use until the end of the block; then stop it.

    It has its own Valkey, key and port, so tests that run side by side in several processes do not meet.

    Args:
        http_options: As for `serve.start`; the port is any free one unless given.
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
    folder = tempfile.mkdtemp(prefix="qs-")  # short: the path of a socket stands in it
    os.environ["QSERVE_RUNTIME_DIR"] = folder
    try:
        yield
    finally:
        del os.environ["QSERVE_RUNTIME_DIR"]
        os.environ.update({name: value for name, value in kept.items() if value is not None})
        shutil.rmtree(folder, ignore_errors=True)
