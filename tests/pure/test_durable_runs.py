"""Durable calls in a replica, by what Redis answers: what does not run, and what is sent again."""

import asyncio
import contextlib
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import Response, StreamingResponse

from qserve import serve
from qserve.broker.connection import Answer, Connection
from qserve.broker.link import Link
from qserve.broker.payloads import Payloads
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.replica_queue import Entry
from qserve.context import set_replica_context
from qserve.errors import BrokerUnavailable, QServeError, ResultTooLarge
from qserve.settings import Settings
from qserve.wire.call_record import CANCELLED, DEAD, DONE, EXPIRED, FAILED, DurableCall, Terms
from qserve.wire.codec import Codec
from qserve.wire.messages import HTTP, PYTHON, HttpRequest, Signer, decode_error, decode_reply, encode
from qserve.wire.spec import DeploymentSpec, Target
from qserve_workers.calls import arrivals, durable_calls
from qserve_workers.calls.durable_calls import DurableRuns
from qserve_workers.calls.running import RunningCall
from qserve_workers.user.user_code import UserCode
from tests.support.open_connection import OpenConnection

ENTRY = Entry(b"1-0", b"", durable=True, call=b"d1")
LIMIT = 100_000
CODEC = Codec(allow_pickle=False, max_bytes=1 << 20)
REQUEST = HttpRequest("GET", "/", b"/", b"", [], "", "http", None, None, "1.1", "r1", b"")


class Replica:
    """One that has the entry 1-0, and the answers of Redis to what it asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: Any) -> None:
        async def nothing() -> None: ...

        monkeypatch.setattr(arrivals, "_NEXT_TRY_S", 0)
        monkeypatch.setattr(durable_calls, "_NEXT_TRY_S", 0)
        self.answers = list(answers)
        self.entries = {ENTRY.id}
        self.settled: list[tuple[str, bytes]] = []
        self.on_answer: Any = None
        self.given_back: list[bool] = []
        self.recorded: list[int] = []
        self.running: RunningCall | None = None
        self.counts = SimpleNamespace(others=Counter[str](), retries=Counter[str]())
        self.link = Link("redis://nowhere", nothing)
        self.link.sender = OpenConnection()
        settings = Settings(
            redis_url="redis://nowhere", secret="0123456789abcdef0123456789abcdef", max_value_bytes=LIMIT
        )
        here: Any = self
        self.signer = Signer(settings.secrets)
        self.runs = DurableRuns(
            *(
                settings,
                self.signer,
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

    async def part(self, _connection: Any, _call: str, _entry: bytes, _attempt: int, index: int, *_: Any) -> None:
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        self.recorded.append(index)

    async def begin(self) -> None:
        running: Any = SimpleNamespace(entry=ENTRY)
        code: Any = None
        await self.runs.run(running, self.call, code)

    async def serve(
        self, code: Any, kind: int, payload: bytes, *, unwanted: bool = False, out_of_line: bool = False
    ) -> Any:
        """Run the call by a replica of that code; returns what it was settled with: a value, or the error's info."""
        self.call = DurableCall("d1", "Echo", "", 1000, kind, "", True, payload, out_of_line, terms=Terms())
        taken = self.running = RunningCall(ENTRY, self.call, needs_thread=False)
        taken.unwanted = unwanted
        spec = DeploymentSpec(name="Echo", target=Target("m:C"), revision="r", is_class=False)
        user_code = UserCode(spec, code, "Echo#1", CODEC)
        await user_code.construct()
        try:
            await self.runs.run(taken, self.call, user_code)
        finally:
            await user_code.close()
            set_replica_context(None)
        assert self.given_back == [True]
        if not self.settled:
            return None
        ((state, frame),) = self.settled
        reply = decode_reply(self.signer.open(frame))
        return reply.payload if state == DONE else decode_error(reply.payload)


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


RUN = [b"run", 1, 0]


@pytest.mark.parametrize(("size", "state"), [(LIMIT - 100, DONE), (LIMIT + 1, FAILED)])
async def test_what_a_call_returns_may_be_as_large_as_the_setting_says(
    monkeypatch: pytest.MonkeyPatch, size: int, state: str
) -> None:
    def large() -> bytes:
        return bytes(size)

    replica = Replica(monkeypatch, RUN)
    told = await replica.serve(large, PYTHON, CODEC.pack_call((), {}))
    assert [state for state, _ in replica.settled] == [state]
    assert state == DONE or (told.code, f"limit is {LIMIT:,}" in told.message) == ("ResultTooLarge", True)


class Stubborn(StreamingResponse):
    """Says that it is complete, whatever becomes of its parts."""

    async def stream_response(self, send: Any) -> None:
        with contextlib.suppress(ResultTooLarge):
            await super().stream_response(send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.mark.parametrize("kind", [Response, StreamingResponse, Stubborn])
async def test_so_may_its_response(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    async def large() -> Response:
        async def body() -> Any:
            for _ in range(11):
                yield bytes(LIMIT // 10)

        made: Response = kind(bytes(LIMIT + 1) if kind is Response else body())
        return made

    replica = Replica(monkeypatch, RUN)
    told = await replica.serve(large, HTTP, encode(REQUEST))
    assert (told.code, "raise QSERVE_MAX_VALUE_BYTES" in told.message) == ("ResultTooLarge", True)


async def test_progress_that_is_too_large_is_an_error_of_who_reports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def report() -> None:
        serve.get_replica_context().report_progress(bytes(65_000))
        serve.get_replica_context().report_progress(bytes(66_000))

    replica = Replica(monkeypatch, RUN)
    monkeypatch.setattr(replica, "progress", lambda *_: replica.recorded.append(1), raising=False)
    told = await replica.serve(report, PYTHON, CODEC.pack_call((), {}))
    await asyncio.sleep(0)
    assert (told.code, "limit is 65,536" in told.message) == ("PayloadTooLarge", True)
    assert replica.recorded == [1]


@pytest.mark.parametrize("is_async", [False, True])
async def test_what_a_call_reports_last_is_told_before_its_end(monkeypatch: pytest.MonkeyPatch, is_async: bool) -> None:
    def report() -> None:
        serve.get_replica_context().report_progress(7)

    async def report_in_async_code() -> None:
        report()

    replica = Replica(monkeypatch, RUN)
    told: list[bool] = []
    monkeypatch.setattr(replica, "progress", lambda *_: told.append(bool(replica.settled)), raising=False)
    await replica.serve(report_in_async_code if is_async else report, PYTHON, CODEC.pack_call((), {}))
    assert told == [False]


async def test_of_a_flood_of_reports_as_many_are_sent_as_redis_takes_and_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def report() -> None:
        for number in range(1000):
            serve.get_replica_context().report_progress(number)

    sent: list[Any] = []

    def take(*given: Any) -> None:  # and answer the first only
        sent.append(CODEC.unpack(decode_reply(replica.signer.open(given[4])).payload))
        if len(sent) == 1:
            given[5](1)

    replica = Replica(monkeypatch, RUN)
    monkeypatch.setattr(replica, "progress", take, raising=False)
    await replica.serve(report, PYTHON, CODEC.pack_call((), {}))
    assert len(sent) <= 102
    assert (sent[0], sent[-1], sent) == (0, 999, sorted(sent))


async def test_a_call_that_was_cancelled_before_its_code_began_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    replica = Replica(monkeypatch, RUN)
    await replica.serve(lambda: ran.append(1), PYTHON, CODEC.pack_call((), {}), unwanted=True)
    assert ran == []
    assert [state for state, _ in replica.settled] == [CANCELLED]
    assert replica.counts.others == {"cancelled": 1}


@pytest.mark.parametrize("fails", [False, True])
async def test_what_comes_of_a_call_that_another_has_taken_over_meanwhile_counts_for_nothing(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    def work() -> str:
        replica.entries.clear()
        if fails:
            raise ValueError("too late")
        return "too late"

    replica = Replica(monkeypatch, RUN)
    assert await replica.serve(work, PYTHON, CODEC.pack_call((), {})) is None
    assert not replica.counts.others


async def test_a_part_is_sent_until_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def numbers() -> Any:
        yield 1
        yield 2

    replica = Replica(monkeypatch, RUN, BrokerUnavailable("lost"), CommandRefused("OOM"))
    told = await replica.serve(numbers, PYTHON, CODEC.pack_call((), {}))
    assert replica.recorded == [1, 2]
    assert CODEC.unpack(told) == [1, 2]


@pytest.mark.parametrize("becomes", ["fetched", "cancelled", "taken over"])
async def test_large_arguments_are_fetched_until_they_are_there_or_nobody_wants_the_call(
    monkeypatch: pytest.MonkeyPatch, becomes: str
) -> None:
    replica = Replica(monkeypatch, RUN)
    answers: list[Any] = [BrokerUnavailable("lost"), CommandRefused("LOADING"), CODEC.pack_call((7,), {})]

    async def fetch(*_: Any) -> bytes:
        answer = answers.pop(0)
        if becomes == "cancelled":
            assert replica.running is not None
            replica.running.unwanted = True
        elif becomes == "taken over":
            replica.entries.clear()
        if isinstance(answer, Exception):
            raise answer
        found: bytes = answer
        return found

    monkeypatch.setattr(Payloads, "fetch", fetch)
    told = await replica.serve(lambda number: number + 1, PYTHON, b"", out_of_line=True)
    if becomes == "fetched":
        assert CODEC.unpack(told) == 8
    else:
        assert [state for state, _ in replica.settled] == ([CANCELLED] if becomes == "cancelled" else [])
        assert len(answers) == 2
