"""Fixtures: sentinels with their servers, and an instance that was told of nothing else."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.failover.sentinels import Failover
from tests.support.shell import Shell
from tests.support.started import own_calls, served, shell_for

__all__ = ["own_calls", "served"]

APP = """
    from qserve import serve

    @serve.deployment(version="1", idempotent=True)
    def echo(value):
        return value if isinstance(value, int) else value.query_params["value"]
"""


@pytest.fixture(scope="module")
def failover() -> Iterator[Failover]:
    folder = Path(tempfile.mkdtemp(prefix="qs-"))
    failover = Failover(folder)
    failover.start()
    yield failover
    failover.kill()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def shell(failover: Failover, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    with shell_for(failover.url, APP, tmp_path_factory.mktemp("app")) as shell:
        yield shell
