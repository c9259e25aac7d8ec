"""The judge of the chaos suite is itself judged: each kind of violation is seen, and what is excused is not one."""

from pathlib import Path
from random import Random

import pytest

from tests.faults.chaos import ledger, report
from tests.faults.chaos.cluster import Cluster
from tests.faults.chaos.faults import REPLICA_DIED, Fault, Injected
from tests.faults.chaos.ledger import END, OK, START, ClientLedger, Order, proof, run_line
from tests.faults.chaos.play import Result
from tests.faults.chaos.verdicts import Judgement, judge

SENT_AT, TIMEOUT_S = 100.0, 30.0


class Books:
    """Ledgers of one client and one replica, in which tests write what they want to have happened."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._client = (folder / "client-0").open("w")
        self._replica = (folder / "replica-7").open("wb")
        self.ledger = ClientLedger(self._client)

    def call(self, name: str = "a", kind: str = "http-once") -> Order:
        """A call is sent."""
        order = Order(name, f"nonce of {name}".replace(" ", "-"), 0.02)
        self.ledger.sent(order, kind, "http://gateway", SENT_AT, TIMEOUT_S)
        return order

    def runs(self, order: Order, at: float = SENT_AT + 0.1, pid: int = 7, ends: bool = True) -> None:
        """A replica starts it, and ends it."""
        self._replica.write(run_line(order.id, START, at, 1, pid, "1"))
        if ends:
            self._replica.write(run_line(order.id, END, at + 0.02, 1, pid, "1"))

    def answers(self, order: Order, outcome: str = OK, at: float = SENT_AT + 0.2, body: str | None = None) -> None:
        """Its client is answered, rightly unless told otherwise."""
        self.ledger.answered(order.id, at, outcome, proof(order.id, order.nonce) if body is None else body)

    def judge(self, *injected: Injected) -> Judgement:
        """The verdicts."""
        self._client.close()
        self._replica.close()
        calls, _ = ledger.read(self._folder)
        return judge(calls.values(), injected)


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(tmp_path)


def kill(at: float, *pids: int) -> Injected:
    def nothing(_cluster: Cluster, _dice: Random, _event: Injected) -> None:
        """Tests only need the excuses."""

    return Injected(Fault("SIGKILL", nothing, REPLICA_DIED), at, at, list(pids))


def test_a_call_with_its_own_answer_is_no_violation(books: Books) -> None:
    order = books.call()
    books.runs(order)
    books.answers(order)

    judgement = books.judge()

    assert (judgement.violations, judgement.calls) == ({}, 1)


def test_no_answer_is_lost(books: Books) -> None:
    books.runs(books.call())
    assert books.judge().violations.keys() == {"lost"}


@pytest.mark.parametrize(("late_s", "verdicts"), [(0.5, set()), (1.5, {"stuck"}), (2.5, {"lost"})])
def test_an_answer_after_the_deadline_is_stuck_or_lost(books: Books, late_s: float, verdicts: set[str]) -> None:
    order = books.call()
    books.runs(order)
    books.answers(order, at=SENT_AT + TIMEOUT_S + late_s)
    assert books.judge().violations.keys() == verdicts


def test_two_answers_are_one_too_many(books: Books) -> None:
    order = books.call()
    books.runs(order)
    books.answers(order)
    books.answers(order)
    assert books.judge().violations.keys() == {"dup-reply"}


def test_the_answer_to_another_call_is_swapped(books: Books) -> None:
    order, other = books.call("a"), books.call("b")
    books.runs(order)
    books.runs(other)
    books.answers(order, body=proof(other.id, other.nonce))
    books.answers(other)
    assert books.judge().violations.keys() == {"swapped"}


def test_a_right_answer_that_no_replica_computed_is_no_answer(books: Books) -> None:
    books.answers(books.call())
    assert books.judge().violations.keys() == {"swapped"}


@pytest.mark.parametrize(("kind", "verdicts"), [("http-once", {"dup-run"}), ("handle-safe", set())])
def test_only_calls_that_are_safe_may_run_twice(books: Books, kind: str, verdicts: set[str]) -> None:
    order = books.call(kind=kind)
    books.runs(order)
    books.runs(order, SENT_AT + 0.2, pid=8)
    books.answers(order, at=SENT_AT + 0.4)
    assert books.judge().violations.keys() == verdicts


def test_an_outcome_is_excused_by_a_fault_while_it_was_under_way(books: Books) -> None:
    books.answers(books.call(), "502")
    assert books.judge(kill(SENT_AT + 0.1)).violations == {}


@pytest.mark.parametrize(
    ("kind", "outcome", "killed_at"),
    [
        ("http-once", "502", SENT_AT - 60),
        ("http-once", "502", SENT_AT + 10),
        ("http-once", "503", SENT_AT + 0.1),
        ("http-safe", "502", SENT_AT + 0.1),
    ],
)
def test_it_is_not_excused_by_a_fault_before_or_after_or_of_another_kind(
    books: Books, kind: str, outcome: str, killed_at: float
) -> None:
    books.answers(books.call(kind=kind), outcome)
    assert books.judge(kill(killed_at)).violations.keys() == {"wrong-code"}


@pytest.mark.parametrize(("deaths", "verdicts"), [(3, set()), (2, {"wrong-code"})])
def test_a_call_may_be_given_up_that_three_replicas_died_under(books: Books, deaths: int, verdicts: set[str]) -> None:
    order = books.call(kind="handle-durable")
    for pid in range(deaths):
        books.runs(order, pid=pid, ends=False)
    books.ledger.answered(order.id, SENT_AT + 9, "500", detail="PoisonCall: Task failed with 2 retries: every replica")

    killed = [kill(SENT_AT + 1, pid) for pid in range(deaths)]
    assert books.judge(*killed).violations.keys() == verdicts


def test_a_call_started_after_its_deadline_is_seen(books: Books) -> None:
    order = books.call()
    books.answers(order, "502")
    books.runs(order, SENT_AT + TIMEOUT_S + 5)
    assert books.judge(kill(SENT_AT)).violations.keys() == {"late-run"}


def test_rows_of_earlier_runs_stay_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PATH", tmp_path / "chaos.md")
    first = Result("K1", "killed", 1, faults=3, judgement=Judgement(calls=1000), figures={"takeover": "1.00 s"})
    report.save([first], ["K1", "K2"])
    report.save([Result("K2", "frozen", 2, judgement=Judgement(calls=200))], ["K1", "K2"])

    text = report.PATH.read_text()

    assert "1,200 calls, 0 of them durable, in 2 of 2 runs" in text
    assert "| K1 | killed | 1 | 3 | 1000 |" in text
    assert "| K1 | takeover | 1.00 s |" in text
    assert "3.0e-03" in text
