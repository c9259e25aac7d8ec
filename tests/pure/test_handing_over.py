"""Who runs a call for a model, by what Redis answers when it is asked."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from qserve.broker.connection import Answer
from qserve.broker.link import Link
from qserve.broker.redis_errors import CommandRefused, NotTaken, StillMoving
from qserve.broker.replica_queue import Entry, ReplicaQueue
from qserve.errors import BrokerUnavailable
from qserve.settings import Settings
from qserve.wire.messages import Control, Signer
from qserve_workers.calls import model_affinity
from qserve_workers.calls.model_affinity import ModelAffinity
from tests.support.open_connection import OpenConnection
from tests.support.waiting import until


class Replica:
    """One that accepts calls, and what it asks Redis and tells other replicas."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def nothing() -> None: ...

        self.asked: list[str] = []
        self.told: list[tuple[str, str]] = []
        self.done: list[str] = []
        self.withdrawn: set[bytes] = set()
        self.on_answer: Callable[[Answer], None] = lambda _answer: None
        self.starting: set[bytes] = set()
        link = Link("redis://nowhere", nothing)
        link.sender = OpenConnection()
        settings = Settings(redis_url="redis://nowhere", secret="0123456789abcdef0123456789abcdef")
        queue = ReplicaQueue(settings.keys, "Zoo", "A")
        withdrawn: Any = self.withdrawn
        self.affinity = ModelAffinity(
            settings, Signer(settings.secrets), queue, link, withdrawn, self.starting, lambda: None
        )
        models: Any = self
        monkeypatch.setattr(self.affinity, "_models", models)
        monkeypatch.setattr(model_affinity, "send_control", self._note_control)
        self.affinity.expect_models(2)
        self.affinity.accept()

    def hold(self, *_: Any) -> None:
        """Nobody reads it here."""

    def hand_over(self, _sender: Any, _entry: bytes, other: str, on_answer: Any, **_: Any) -> None:
        self.asked.append(other)
        self.on_answer = on_answer

    def give_back(self, _sender: Any, _entry: bytes, other: str, on_answer: Any) -> None:
        self.hand_over(None, b"", other, on_answer)

    def _note_control(self, *arguments: Any) -> None:
        self.told.append((arguments[3], arguments[4].entry))

    def ask(self, answers: Iterable[Answer]) -> None:
        """Ask who runs the call 1-0 for the model lion, and get these answers."""
        assert self.affinity.places(
            b"1-0", "lion", lambda: self.done.append("keep"), lambda: self.done.append("forget")
        )
        for answer in answers:
            self.on_answer(answer)


@pytest.fixture
async def replica(monkeypatch: pytest.MonkeyPatch) -> Replica:
    return Replica(monkeypatch)


@pytest.mark.parametrize(
    ("answers", "asked", "done"),
    [
        ([0], [""], "keep"),
        ([b"B", 1], ["", "B"], "forget"),
        ([b"B", b"C", b"B"], ["", "B", "C"], "keep"),  # they are asked no more often than that
        ([-1], [""], "forget"),
        ([BrokerUnavailable("lost")], [""], "forget"),
        ([CommandRefused("NOPERM")], [""], "keep"),
        ([b"B", NotTaken("moved")], ["", "B"], "keep"),  # a cluster moves the slot: nothing was done
        ([StillMoving("moving")], [""], "keep"),
    ],
)
async def test_a_call_is_run_here_or_forgotten_and_never_both(
    replica: Replica, answers: list[Answer], asked: list[str], done: str
) -> None:
    replica.ask(answers)
    assert replica.asked == asked
    assert replica.done == [done]
    assert not replica.starting


async def test_who_runs_a_call_hears_that_its_caller_has_left(replica: Replica) -> None:
    replica.ask([b"B", 1])
    replica.affinity.withdraw(b"1-0", inherited=False)
    assert replica.told == [("B", "1-0")]
    replica.withdrawn.add(b"1-0")  # while it is asked
    replica.ask([1])
    assert replica.told == [("B", "1-0")] * 2


@pytest.mark.parametrize(
    ("answer", "is_here"),
    [
        *((1, False), (0, True), (-1, False)),
        *((BrokerUnavailable("lost"), False), (CommandRefused("NOPERM"), True)),
        *((NotTaken("moved"), True), (StillMoving("moving"), True)),
    ],
)
async def test_a_call_that_nobody_takes_back_stays(replica: Replica, answer: Answer, is_here: bool) -> None:
    replica.affinity.take(Control("adopt", "1-0 lion"), "B")
    replica.affinity.decline()
    assert replica.asked == ["B"]
    assert replica.starting == {b"1-0"}
    replica.on_answer(answer)
    assert (b"1-0" in replica.affinity.waiting) == is_here
    assert not replica.starting


async def test_a_call_that_comes_back_waits_here_once(replica: Replica) -> None:
    replica.affinity.take(Control("take_back", "1-0"), "B")
    replica.affinity.take(Control("adopt", "1-0 lion"), "B")
    assert list(replica.affinity.waiting) == [b"1-0"]
    replica.affinity.forget([b"1-0", b"2-0"])
    assert not replica.affinity.waiting


async def test_a_call_whose_caller_has_left_is_ended_without_room(replica: Replica) -> None:
    for entry in ("1-0", "2-0", "3-0"):
        replica.affinity.take(Control("adopt", f"{entry} lion"), "B")
    replica.withdrawn.add(b"2-0")
    replica.affinity.start(0, lambda _entry: None)
    assert replica.starting == {b"2-0"}
    assert list(replica.affinity.waiting) == [b"1-0", b"3-0"]


async def test_a_call_cannot_start_while_its_connection_is_lost(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(*_: Any) -> None:
        raise BrokerUnavailable("lost")

    monkeypatch.setattr(ReplicaQueue, "adopt", lost)
    begun: list[object] = []
    replica.affinity.take(Control("adopt", "1-0 lion"), "B")
    replica.affinity.start(1, begun.append)
    await until(lambda: not replica.starting)
    assert not begun
    assert not replica.affinity.waiting


@pytest.mark.parametrize("refusal", [NotTaken("moved"), StillMoving("moving"), CommandRefused("NOPERM")])
async def test_a_call_that_redis_refuses_to_start_is_started_later(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    entry = Entry(b"1-0", b"frame")
    outcomes: list[Exception | Entry] = [refusal, entry]

    async def adopt(*_: Any) -> Entry:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(ReplicaQueue, "adopt", adopt)
    monkeypatch.setattr(model_affinity, "_PATIENCE_S", 0.01)
    begun: list[Entry] = []
    replica.affinity.take(Control("take_back", "1-0"), "B")
    replica.affinity.start(1, begun.append)
    assert replica.starting == {b"1-0"}, "a link that comes up meanwhile takes it for one that was lost"
    await until(lambda: b"1-0" in replica.affinity.waiting)
    replica.affinity.start(1, begun.append)
    await until(lambda: begun == [entry])
    assert not replica.starting
