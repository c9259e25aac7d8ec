"""Fixtures of the tests of streams, WebSockets and cancellation: an instance, and clients of it."""

from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import httpx
import pytest

from qserve.testing import TestInstance
from tests.behaviours import tools
from tests.behaviours.tools import LIMIT_S, Gate, Notes
from tests.streaming import processes

cloudpickle.register_pickle_by_value(tools)  # replicas need not find the tests
cloudpickle.register_pickle_by_value(processes)


@pytest.fixture
def http(qserve_instance: TestInstance) -> Iterator[httpx.Client]:
    """An HTTP client of the instance."""
    with httpx.Client(base_url=qserve_instance.url, timeout=LIMIT_S) as client:
        yield client


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A gate that is open at the end of the test at the latest."""
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    """Notes of this test."""
    return Notes(tmp_path / "notes")
