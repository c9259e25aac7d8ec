"""One instance and one console for the tests of a module; what is deployed stays from one test to the next."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from qserve import serve
from qserve.calls import process_client
from qserve.testing import TestInstance
from tests.instance.console.served import console_of, deploy_shop


@pytest.fixture(scope="module")
def running(_session_instance: tuple[TestInstance, str]) -> Iterator[TestInstance]:
    """The instance, which `serve` of this process uses."""
    found, folder = _session_instance
    before, os.environ["QSERVE_RUNTIME_DIR"] = os.environ["QSERVE_RUNTIME_DIR"], folder
    yield found
    found.clear()
    process_client.close_current_client()
    os.environ["QSERVE_RUNTIME_DIR"] = before


@pytest.fixture(scope="module")
def console(running: TestInstance) -> Iterator[str]:
    """The URL of its console."""
    with console_of(running.settings, QSERVE_CONSOLE_LABEL="staging") as url:
        yield url


@pytest.fixture
def shop(running: TestInstance) -> Any:
    """A handle for durable calls of a deployment that is as it was in the beginning."""
    deploy_shop()
    return serve.get_deployment("shop").get_handle().options(durable=True)
