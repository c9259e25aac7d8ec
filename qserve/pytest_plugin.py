"""Fixtures for pytest, which finds them by itself where qserve is installed.

`qserve_local` is `qserve.testing.local` for one test, and `qserve_instance` a whole instance for the session, without
deployments at the beginning of each test.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qserve.testing import LocalServing, TestInstance

# qserve itself is imported by the first test that uses a fixture: most sessions have none.


@pytest.fixture
def qserve_local() -> "Iterator[Callable[[Any], LocalServing]]":
    """A function that takes an application or deployments, and runs them in this process until the end of the test."""
    from qserve import testing  # noqa: PLC0415

    with ExitStack() as stack:
        yield lambda target: stack.enter_context(testing.local(target))


@pytest.fixture(scope="session")
def _qserve_session_instance() -> "Iterator[TestInstance]":
    from qserve import testing  # noqa: PLC0415

    with testing.instance() as running:
        yield running


@pytest.fixture
def qserve_instance(_qserve_session_instance: "TestInstance") -> "Iterator[TestInstance]":
    """A whole instance of its own, shared by the session; every deployment is deleted after each test."""
    yield _qserve_session_instance
    _qserve_session_instance.clear()
