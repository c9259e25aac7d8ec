"""Fixtures: a real server for each session, and a whole instance where a test wants one."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest
import redis

from qserve.broker.instance.state import State
from qserve.broker.keys import Keys
from qserve.calls import process_client
from qserve.settings import Settings
from qserve.testing import TestInstance
from qserve.wire.messages import Signer
from tests.support.chosen_server import client_of, empty, running_instance, running_server
from tests.support.servers import SECRET
from tests.support.slowness import patience


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """What a test may take before it counts as a hang is written for an idle machine."""
    given = item.get_closest_marker("timeout")
    seconds = float(given.args[0] if given else item.config.getini("timeout"))
    item.add_marker(pytest.mark.timeout(patience(seconds)), append=False)
    return (yield)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_works() -> Iterator[None]:
    """The processes that tests start hear SIGINT, also where this one was started to ignore it, as background jobs are.

    Whether a signal is ignored is inherited; a handler is not.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def no_instance_of_the_user() -> Iterator[None]:
    """Tests never meet an instance that runs on this machine, nor settings of the one who runs them."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("QSERVE_")}
    for name in kept:
        del os.environ[name]
    folder = tempfile.mkdtemp(prefix="qs-")
    os.environ["QSERVE_RUNTIME_DIR"] = folder
    yield
    del os.environ["QSERVE_RUNTIME_DIR"]
    os.environ.update(kept)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """URL of a private server, for the session."""
    with running_server() as url:
        yield url


@pytest.fixture
def redis_client(redis_server: str) -> Iterator["redis.Redis"]:
    """A client of the session's server, which is empty."""
    empty(redis_server)
    with client_of(redis_server) as client:
        yield client


@pytest.fixture
def settings(redis_server: str, redis_client: "redis.Redis") -> Settings:
    """Settings of an empty, signed namespace."""
    return Settings(redis_url=redis_server, secret=SECRET, namespace="test")


@pytest.fixture
def keys(settings: Settings) -> Keys:
    """Key names of that namespace."""
    return settings.keys


@pytest.fixture
def signer(settings: Settings) -> Signer:
    """Its signer."""
    return Signer(settings.secrets)


@pytest.fixture
def state(settings: Settings, signer: Signer) -> Iterator[State]:
    """Its state."""
    state = State(settings.redis_url, settings.keys, signer)
    yield state
    state.close()


@pytest.fixture(scope="session")
def _session_instance() -> Iterator[tuple[TestInstance, str]]:
    outside = os.environ["QSERVE_RUNTIME_DIR"]
    with running_instance() as running:
        inside = os.environ["QSERVE_RUNTIME_DIR"]
        os.environ["QSERVE_RUNTIME_DIR"] = outside
        yield running, inside
        os.environ["QSERVE_RUNTIME_DIR"] = inside


@pytest.fixture
def qserve_instance(
    _session_instance: tuple[TestInstance, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[TestInstance]:
    """A whole local instance without deployments, for the length of a test; `serve` of this process uses it."""
    running, folder = _session_instance
    monkeypatch.setenv("QSERVE_RUNTIME_DIR", folder)
    yield running
    running.clear()
    process_client.close_current_client()
