"""Durable calls in a replica, by what Redis answers: what does not run, and what is sent again."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from qserve.broker.connection import Answer, Connection
from qserve.broker.link import Link
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.replica_queue import Entry
from qserve.errors import BrokerUnavailable, QServeError
from qserve.settings import Settings
from qserve.wire.call_record import CANCELLED, DEAD, EXPIRED, DurableCall, Terms
from qserve.wire.codec import Codec
from qserve.wire.messages import PYTHON, Signer
from qserve_workers.calls import durable_calls
from qserve_workers.calls.durable_calls import DurableRuns
from tests.support.open_connection import OpenConnection

ENTRY = Entry(b"1-0", b"", durable=True, call=b"d1")


class Replica:
    """One that has the entry 1-0, and the answers of Redis to what it asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: Any) -> None:
        async def nothing() -> None: ...

        monkeypatch.setattr(durable_calls, "_NEXT_TRY_S", 0)
        self.answers = list(answers)
        self.entries = {ENTRY.id}
        self.settled: list[tuple[str, bytes]] = []
        self.on_answer: Any = None
        self.given_back: list[bool] = []
        self.link = Link("redis://nowhere", nothing)
        self.link.sender = OpenConnection()
        settings = Settings(redis_url="redis://nowhere", secret="0123456789abcdef0123456789abcdef")
        here: Any = self
        self.runs = DurableRuns(
            *(
                settings,
                Signer(settings.secrets),
                Codec(allow_pickle=False, max_bytes=1 << 20),
                "A",
                self.link,
                here,
                here,
            ),
            clock=here,
            hooks=None,
            on_retry=lambda _pause_s: None,
        )
        monkeypatch.setattr(self.runs, "_records", here)
        self.call = DurableCall("d1", "Echo", "", 1000, PYTHON, "", True, b"", terms=Terms())

    def __contains__(self, entry: bytes) -> bool:
        return entry in self.entries

    def give_back(self, _running: Any, *, ran: bool) -> None:
        self.given_back.append(ran)

    def open(self, _connection: Connection) -> None:
        """There is nothing to load."""

    async def run(self, *_: Any) -> list[Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        found: list[Any] = answer
        return found

    reject = run

    def settle(self, _connection: Any, _call: Any, _entry: bytes, *, state: str, frame: bytes, **rest: Any) -> None:
        self.settled.append((state, frame))
        self.on_answer = rest["on_answer"]

    async def begin(self) -> None:
        running: Any = SimpleNamespace(entry=ENTRY)
        code: Any = None
        await self.runs.run(running, self.call, code)


async def test_a_cancelled_call_does_not_run_and_is_settled_as_its_record_says(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica(monkeypatch, BrokerUnavailable("lost"), CommandRefused("LOADING"), [b"cancelled", b"frame"])
    await replica.begin()
    assert replica.settled == [(CANCELLED, b"frame")]
    assert replica.given_back == [False]


async def test_an_expired_call_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica(monkeypatch, [b"expired"])
    await replica.begin()
    assert [state for state, _ in replica.settled] == [EXPIRED]
    assert replica.given_back == [False]


async def test_a_call_that_another_has_taken_over_meanwhile_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica(monkeypatch)
    replica.entries.clear()
    await replica.begin()
    assert replica.settled == []
    assert replica.given_back == [False]


@pytest.mark.parametrize("answer", [CommandRefused("OOM"), BrokerUnavailable("lost")])
async def test_a_settlement_is_sent_until_it_is_confirmed(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> None:
    replica = Replica(monkeypatch)
    later: list[Any] = []
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", lambda *given: later.append(given))
    replica.runs.bury(ENTRY, replica.call, "it killed them all", QServeError("gone"))
    replica.on_answer(answer)
    assert list(replica.runs.settled) == [ENTRY.id]
    assert bool(later) == isinstance(answer, CommandRefused)  # a new connection sends it anyway
    replica.runs.resend()
    assert [state for state, _ in replica.settled] == [DEAD, DEAD]
    replica.on_answer(1)
    assert not replica.runs.unconfirmed
    replica.runs.resend()
    assert len(replica.settled) == 2


async def test_an_entry_that_cannot_be_given_up_now_is_left_to_the_next_link(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replica = Replica(monkeypatch, CommandRefused("NOPERM"))
    await replica.runs.reject(ENTRY, "Echo", ValueError("no call"))
    assert "could not give up entry b'1-0': NOPERM" in caplog.text
    replica.link.sender = Connection()
    await replica.runs.reject(ENTRY, "Echo", ValueError("no call"))
    assert replica.answers == []
