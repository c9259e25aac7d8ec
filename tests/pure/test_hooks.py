"""Hooks: found by their import path, run around a call in order, and never the reason why a call fails."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from qserve import hooks
from qserve.broker.server.clock import RedisClock
from qserve.errors import ConfigurationError
from qserve.hooks import ClientCall, ClientHook, GatewayHook, HookChain, ReplicaHook, checked_meta, load_hooks
from qserve.wire.call_record import DurableCall, DurableCallWithMeta, Terms, decode_durable_call
from qserve.wire.messages import Call, CallWithMeta, decode_call, decoder_of, encode, encode_bare
from qserve_workers.calls.call_hooks import with_hooks

PLAIN = ("id", "Echo", "caller", 1000, 0, "", False, b"payload")
CALL = ClientCall("Echo", "", "call")


class Mine(ReplicaHook):
    """A hook of one kind."""


class Noting(ClientHook):
    def __init__(self, name: str, notes: list[Any]) -> None:
        self.name, self.notes = name, notes

    def before(self, call: ClientCall) -> str:
        self.notes.append(("before", self.name))
        return f"state of {self.name}"

    def after(self, call: ClientCall, state: Any) -> None:
        self.notes.append(("after", self.name, state))

    def error(self, call: ClientCall, state: Any, error: BaseException) -> None:
        self.notes.append(("error", self.name, state, error))


class Failing(ClientHook):
    def before(self, call: ClientCall) -> None:
        raise SystemExit("no")

    def after(self, call: ClientCall, state: Any) -> None:
        raise ValueError("no")


def test_the_hooks_of_one_kind_are_those_that_are_asked_for() -> None:
    path = f" {__name__}:Mine ,"
    (hook,) = load_hooks(path, ReplicaHook)
    assert isinstance(hook, Mine)
    assert load_hooks(path, GatewayHook) == ()
    assert load_hooks("", ClientHook) == ()


def test_modules_of_the_current_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hooks_of_a_user.py").write_text(
        "from qserve.hooks import ReplicaHook\nclass Mine(ReplicaHook): ...\nmine = Mine()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    (hook,) = load_hooks("hooks_of_a_user:mine", ReplicaHook)
    assert type(hook).__name__ == "Mine"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("no_such_module:Hook", "No module named"),
        (f"{__name__}:CALL", "is no hook"),
        (f"{__name__}:Noting", "TypeError"),
    ],
)
def test_what_cannot_be_a_hook_is_named(path: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as raised:
        load_hooks(path, ClientHook)
    assert path in str(raised.value)


def test_hooks_surround_a_call_in_order() -> None:
    notes: list[Any] = []
    chain = HookChain([Noting("outer", notes), Noting("inner", notes)])
    states = chain.before(CALL)
    chain.after(CALL, states)
    error = ValueError()
    chain.error(CALL, states, error)
    assert notes == [
        *[("before", "outer"), ("before", "inner")],
        *[("after", "inner", "state of inner"), ("after", "outer", "state of outer")],
        *[("error", "inner", "state of inner", error), ("error", "outer", "state of outer", error)],
    ]


def test_what_a_hook_raises_is_logged_once_and_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    notes: list[Any] = []
    chain = HookChain([Failing(), Noting("good", notes)])
    for _ in range(3):
        states = chain.before(CALL)
        chain.after(CALL, states)
    assert notes == [("before", "good"), ("after", "good", "state of good")] * 3
    assert [record.getMessage() for record in caplog.records if record.name == hooks.__name__] == [
        f"the hook {__name__}.Failing raised in {method}(); the call goes on, and this is not logged again"
        for method in ("before", "after")
    ]


def test_meta_that_cannot_travel_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert checked_meta({"traceparent": "00-1-2-01"}) == {"traceparent": "00-1-2-01"}
        assert checked_meta({"big": "x" * 8190}) == {}
        assert checked_meta({"number": 1}) == {}  # type: ignore[dict-item]
        assert checked_meta({"surrogate": "\ud800"}) == {}
    assert "8193 bytes" in caplog.text
    assert caplog.text.count("UTF-8") == 2


class TestOnTheWire:
    """A call's meta is the last field, so that those who know none overlook it, and takes no byte when empty."""

    def test_a_call_without_meta_is_written_as_ever(self) -> None:
        bare = Call(*PLAIN)
        read = decode_call(encode(bare))
        assert (read.meta, bare.meta) == ({}, {})
        assert encode_bare(read) == encode_bare(bare) == encode(bare)

    def test_meta_arrives_also_where_nobody_knows_it(self) -> None:
        body = encode_bare(CallWithMeta(*PLAIN, meta={"k": "v"}))
        assert decode_call(body).meta == {"k": "v"}
        assert decoder_of(Call)(body) == Call(*PLAIN)

    def test_durable_calls_are_no_different(self) -> None:
        bare = DurableCall(*PLAIN, terms=Terms(retries=2))
        read = decode_durable_call(encode(bare))
        assert encode_bare(read) == encode(bare)
        full = encode_bare(DurableCallWithMeta(*PLAIN, terms=Terms(retries=2), meta={"k": "v"}))
        assert (decode_durable_call(full).meta, decode_durable_call(full).terms.retries) == ({"k": "v"}, 2)
        assert decoder_of(DurableCall)(full) == bare


class Choosy(Noting):
    def wants(self, deployment: str) -> bool:
        return deployment == self.name


class Broken(ClientHook):
    def wants(self, deployment: str) -> bool:
        raise KeyError(deployment)


def test_hooks_run_around_what_they_want() -> None:
    notes: list[Any] = []
    plain = HookChain([Noting("always", notes)])
    assert plain.choose("Echo") is plain
    assert HookChain([Choosy("Echo", notes)]).choose("Other") is None

    chosen = HookChain([Choosy("Other", notes), Noting("always", notes), Choosy("Echo", notes)]).choose("Echo")

    assert chosen is not None
    chosen.after(CALL, chosen.before(CALL))
    assert [name for _, name, *_ in notes] == ["always", "Echo", "Echo", "always"]


def test_a_hook_that_cannot_say_what_it_wants_gets_the_call(caplog: pytest.LogCaptureFixture) -> None:
    chain = HookChain([Broken()])
    assert [chain.choose("Echo") for _ in range(2)] == [chain, chain]
    assert caplog.text.count("Broken raised in wants()") == 1


class Told(ReplicaHook):
    needs_meta = True


@pytest.mark.parametrize(("hooks", "asked"), [([Told()], False), ([Told(), Told()], False), ([Told(), Mine()], True)])
def test_hooks_that_need_meta_are_not_asked_about_calls_without_it(hooks: list[ReplicaHook], asked: bool) -> None:
    async def run(*_arguments: object) -> tuple[int, str]:
        return 0, ""

    plain, told = with_hooks(run, HookChain(hooks), RedisClock())
    assert (plain is not run) == asked
    assert told is not run
    assert with_hooks(run, None, RedisClock()) == (run, run)
