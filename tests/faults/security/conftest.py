"""Fixtures: an instance whose Redis has a user for each kind of process."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.security.guarded import Guarded, guarded


@pytest.fixture(scope="module")
def instance() -> Iterator[Guarded]:
    """A server with users, a node and a gateway; Echo is deployed."""
    folder = Path(tempfile.mkdtemp(prefix="qs-"))
    try:
        with guarded(folder) as running:
            deployed = running.run("deployer", "qserve.cli", "deploy", "tests.faults.security.guarded_app")
            assert deployed.returncode == 0, deployed.stderr + running.log("node")
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)
