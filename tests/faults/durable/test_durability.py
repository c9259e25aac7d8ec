"""How safe a call is when it is said to be submitted, and what is told where that cannot be reached."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import qserve
from qserve import serve
from qserve.broker import confirming
from qserve.broker.confirming import Confirmed
from qserve.broker.instance.state import State
from qserve.broker.keys import Keys
from qserve.broker.records import submit_arguments
from qserve.broker.server import embedded
from qserve.calls import process_client
from qserve.calls.handle import get_handle
from qserve.wire.call_record import ANYONE, NEVER_MS, DurableCall, DurableOptions, Terms, new_call_id
from qserve.wire.messages import Signer, encode
from qserve.wire.spec import DeploymentSpec, Target
from tests.support.servers import SECRET, wait_until_accepting
from tests.support.serving import free_port, runtime_folder

KEYS = Keys("default")
SIGNER = Signer((SECRET.encode(),))


@contextmanager
def started(*options: str) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """URL and process of a server."""
    with runtime_folder() as folder:
        running = subprocess.Popen([*embedded.command(folder), *options])
        try:
            wait_until_accepting(embedded.socket_path(folder), running)
            yield embedded.redis_url(folder), running
        finally:
            running.kill()
            running.wait()


@contextmanager
def server(*options: str) -> Iterator[str]:
    """URL of a server."""
    with started(*options) as (url, _):
        yield url


def deploy(url: str) -> None:
    state = State(url, KEYS, SIGNER)
    if state.get("x") is None:
        state.deploy(DeploymentSpec(name="x", target=Target("m:x"), revision="r"), expected=0)
    state.close()


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Submits a call to an instance on a server."""

    def submit(url: str, durability: str | None = None) -> Any:
        monkeypatch.setenv("QSERVE_REDIS_URL", url)
        monkeypatch.setenv("QSERVE_SECRET", SECRET)
        deploy(url)
        options: Any = {} if durability is None else {"durability": durability}
        return get_handle("x").options(durable=True, **options).remote()

    yield submit
    process_client.close_current_client()


def test_a_call_is_on_the_disk_when_it_is_submitted(submit: Any) -> None:
    with server("--appendonly", "yes") as url:
        refs = [submit(url, "fsync") for _ in range(3)]
        assert {ref.status().state for ref in refs} == {"queued"}


def test_a_call_that_is_not_on_the_disk_yet_is_told(submit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server would write it down at some time, and says that it has not."""
    monkeypatch.setattr(confirming, "PATIENCE_S", 0.2)
    not_on_disk = pytest.raises(qserve.BrokerUnavailable, match="has not written it to its disk")
    with server("--appendonly", "yes", "--appendfsync", "no") as url, not_on_disk:
        submit(url, "fsync")


def test_a_server_that_writes_nothing_down_is_told_with_the_id(submit: Any) -> None:
    with server() as url:
        with pytest.raises(qserve.BrokerUnavailable, match=r"durability='fsync'.*appendonly.*get_ref") as caught:
            submit(url, "fsync")
        call_id = str(caught.value).partition("get_ref('")[2][:33]
        assert serve.get_ref(call_id).status().state == "queued"


def test_the_setting_asks_for_a_replica_and_one_that_is_there_is_enough(
    submit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confirming, "PATIENCE_S", 0.3)
    monkeypatch.setenv("QSERVE_DURABILITY", "replica")
    port = free_port()
    with server("--port", str(port), "--repl-diskless-sync-delay", "0") as url:
        with pytest.raises(qserve.BrokerUnavailable, match="no replica of Redis has it"):
            submit(url)
        monkeypatch.setattr(confirming, "PATIENCE_S", 20)
        with server("--replicaof", "127.0.0.1", str(port)):
            assert submit(url).status().state == "queued"


@pytest.mark.parametrize("again", ["with its idempotency key", "under its id"])
async def test_a_call_that_is_submitted_again_is_confirmed_when_a_replica_has_it(
    again: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confirming, "PATIENCE_S", 30)
    port = free_port()
    with (
        server("--port", str(port), "--repl-diskless-sync-delay", "0") as url,
        started("--replicaof", "127.0.0.1", str(port)) as (_, replica),
    ):
        deploy(url)
        await Confirmed(url, "replica").submit(submission("before"))
        replica.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(confirming, "PATIENCE_S", 0.3)
        first = submission("key")
        for arguments in (first, first if again == "under its id" else submission("key")):
            with pytest.raises(qserve.BrokerUnavailable, match="no replica of Redis has it"):
                await Confirmed(url, "replica").submit(arguments)
        monkeypatch.setattr(confirming, "PATIENCE_S", 30)
        replica.send_signal(signal.SIGCONT)
        answer: Any = await Confirmed(url, "replica").submit(submission("key"))
        assert answer[1].startswith(b"same:")


def submission(key: str) -> tuple[Any, ...]:
    """Keys and arguments of a script that submits a call with an idempotency key."""
    call = DurableCall(new_call_id(), "x", ANYONE, NEVER_MS, 0, "", True, b"", False, terms=Terms())
    options = DurableOptions(idempotency=key, body_hash="body", key=key)
    return submit_arguments(KEYS, "x", [(call, SIGNER.seal(encode(call)), options)], "")


def test_what_cannot_be_asked_for_is_refused() -> None:
    with pytest.raises(ValueError, match="durability"):
        get_handle("x").options(durable=True, durability="disk")  # type: ignore[call-overload]
