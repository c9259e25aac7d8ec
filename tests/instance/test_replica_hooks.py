"""Hooks of a replica, around calls of every kind; one of them always raises."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import qserve
from qserve import serve
from qserve.testing import TestInstance, instance
from tests.support import replica_hooks
from tests.support.waiting import LIMIT_S, wait_until


class Noted:
    """What the hook of the replicas has noted."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def of(self, **facts: Any) -> list[dict[str, Any]]:
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        found = [json.loads(line) for line in lines]
        return [note for note in found if facts.items() <= note.items()]

    def went(self, call_id: str, *events: str) -> dict[str, Any]:
        """Wait until a call went like this; returns the last note."""
        wait_until(lambda: [note["event"] for note in self.of(id=call_id)] == list(events))
        return self.of(id=call_id)[-1]


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[TestInstance]:
    """An instance whose replicas have hooks."""
    monkeypatch.setenv("QSERVE_HOOKS", replica_hooks.HOOKS)
    monkeypatch.setenv(replica_hooks.NOTES, str(tmp_path / "notes"))
    with instance() as running:
        yield running


@pytest.fixture
def noted(tmp_path: Path) -> Noted:
    return Noted(tmp_path / "notes")


@pytest.mark.timeout(120)
def test_hooks_surround_calls_of_every_kind_and_user_code_sees_what_they_set(
    hooked: TestInstance, noted: Noted
) -> None:
    plain = serve.deployment(name="plain")(replica_hooks.Plain)
    plain.deploy()
    handle: Any = plain.get_handle()

    for method in ("coroutine", "thread"):
        note = noted.went(getattr(handle, method).remote().result(LIMIT_S), "before", "after")
        assert (note["kind"], note["method"], note["durable"]) == ("call", method, False)
        note = noted.went(handle.options(method_name=method, durable=True).remote().result(LIMIT_S), "before", "after")
        assert (note["kind"], note["method"], note["durable"]) == ("call", method, True)
    for method in ("generator", "async_generator"):
        (first, second) = handle.options(method_name=method, stream=True).remote()
        assert first == second
        assert noted.went(first, "before", "after")["kind"] == "stream"

    pairs = qserve.get([handle.batched.remote(number) for number in range(2)], timeout=LIMIT_S)
    assert [together for _, together in pairs] == [2, 2]
    assert len({call_id for call_id, _ in pairs}) == 2
    for call_id, _ in pairs:
        noted.went(call_id, "before", "after")

    for method, error in (("fail", "ZeroDivisionError"), ("panic", "KeyboardInterrupt")):
        with pytest.raises(qserve.TaskError):
            getattr(handle, method).remote().result(LIMIT_S)
        (ended,) = noted.of(method=method, event="error")
        assert ended["error"] == error
        noted.went(ended["id"], "before", "error")

    answer = httpx.get(f"{hooked.url}/plain", timeout=LIMIT_S)
    assert noted.went(answer.text, "before", "after")["kind"] == "http"


@pytest.mark.timeout(120)
def test_hooks_surround_the_requests_of_an_application(hooked: TestInstance, noted: Noted) -> None:
    serve.deployment(name="app")(replica_hooks.Ingress).deploy()

    for path in ("coroutine", "thread"):
        answer = httpx.get(f"{hooked.url}/app/{path}", timeout=LIMIT_S)
        assert noted.went(answer.json(), "before", "after")["kind"] == "http"
    with connect(f"{hooked.url.replace('http', 'ws', 1)}/app/socket") as socket:
        call_id = socket.recv(timeout=LIMIT_S)
    assert noted.went(str(call_id), "before", "after")["kind"] == "websocket"

    assert httpx.get(f"{hooked.url}/app/fails", timeout=LIMIT_S).status_code == 500
    with connect(f"{hooked.url.replace('http', 'ws', 1)}/app/fails") as socket, pytest.raises(ConnectionClosed):
        socket.recv(timeout=LIMIT_S)
    wait_until(lambda: len(noted.of(event="error")) == 2)
    assert {(note["kind"], note["error"]) for note in noted.of(event="error")} == {
        ("http", "ZeroDivisionError"),
        ("websocket", "ZeroDivisionError"),
    }
