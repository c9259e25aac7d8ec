"""Fixtures of the tests that show the API's behaviours against a real instance."""

from collections.abc import Callable, Iterator
from pathlib import Path

import cloudpickle
import httpx
import pytest

from qserve.testing import TestInstance
from tests.behaviours import tools
from tests.behaviours.tools import LIMIT_S, Gate, Notes

cloudpickle.register_pickle_by_value(tools)  # replicas need not find the tests


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


@pytest.fixture
def make_gate(tmp_path: Path) -> Iterator[Callable[[str], Gate]]:
    """More gates, by name."""
    made: dict[str, Gate] = {}

    def make(name: str) -> Gate:
        return made.setdefault(name, Gate(tmp_path / f"gate-{name}"))

    yield make
    for gate in made.values():
        gate.open()
