"""Fixtures: nodes on the session's Valkey, and this process as a client of theirs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qserve.calls.process_client import close_current_client
from qserve.settings import Settings
from tests.support.nodes import start_node

__all__ = ["start_node"]


@pytest.fixture(autouse=True)
def client(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`serve` and handles of this process belong to the instance of these tests."""
    for name in ("redis_url", "secret", "namespace"):
        monkeypatch.setenv(f"QSERVE_{name.upper()}", getattr(settings, name))
    yield
    close_current_client()


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Where the replicas note what they run."""
    return tmp_path / "notes"
