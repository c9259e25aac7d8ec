"""Fixtures of the tests against a whole instance: its HTTP client, and files that the tests share with its replicas."""

from collections.abc import Callable, Iterator
from pathlib import Path

import cloudpickle
import httpx
import pytest

from qserve.testing import TestInstance
from tests.support import gates, processes
from tests.support.gates import Gate, Notes
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S

for module in (gates, processes):  # replicas need not find the tests
    cloudpickle.register_pickle_by_value(module)


@pytest.fixture
def http(qserve_instance: TestInstance) -> Iterator[httpx.Client]:
    """An HTTP client of the instance."""
    with httpx.Client(base_url=qserve_instance.url, timeout=patience(LIMIT_S)) as client:
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


@pytest.fixture
def make_gate(tmp_path: Path) -> Iterator[Callable[[str], Gate]]:
    """More gates, by name."""
    made: dict[str, Gate] = {}

    def make(name: str) -> Gate:
        return made.setdefault(name, Gate(tmp_path / f"gate-{name}"))

    yield make
    for gate in made.values():
        gate.open()
