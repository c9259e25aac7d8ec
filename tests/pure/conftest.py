"""Nothing here starts a process: that keeps `make fast` fast, and its tests without waiting."""

import sys
from collections.abc import Iterator

import pytest

_STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec"}
_forbidden = False


def _no_processes(event: str, _args: object) -> None:
    if _forbidden and event in _STARTS:
        raise AssertionError("a test in tests/pure starts a process: it belongs into tests/process")


sys.addaudithook(_no_processes)


@pytest.fixture(autouse=True)
def no_processes() -> Iterator[None]:
    """Starting one fails."""
    global _forbidden
    _forbidden = True
    yield
    _forbidden = False
