"""What HTTP clients are told of durable calls, and which requests become ones, with records that each test writes."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from starlette.types import Message, Scope

from qserve.durable.watching import CallWatcher
from qserve.errors import BackPressureError, BrokerUnavailable, CallNotFound, ResultNotSerializable
from qserve.settings import Settings
from qserve.wire.call_record import CallRecord
from qserve.wire.codec import Codec
from qserve.wire.messages import (
    ERROR,
    HTTP_RESPONSE,
    VALUE,
    ErrorInfo,
    HttpRequest,
    HttpResponse,
    Outcome,
    Reply,
    encode,
)
from qserve.wire.options import Backpressure
from qserve.wire.spec import DeploymentSpec, Target
from qserve_gateway.api_keys import load_api_keys
from qserve_gateway.durable.durable_events import EventStream
from qserve_gateway.durable.durable_pages import DurablePages
from qserve_gateway.durable.durable_requests import LONGEST_WAIT_S, DurableRequests, Preference, preference_of
from qserve_gateway.gateway import Gateway
from qserve_gateway.respond import Refused
from tests.pure.test_gateway_app import FakeCalls
from tests.support.slowness import patience
from tests.support.waiting import until

CALL = "d" + "0" * 32
EARLIER = "d" + "1" * 32
CODEC = Codec(allow_pickle=True, max_bytes=10_000)


class FakeDurable:
    """Stands for the client and its durable calls: one call with a record, and what comes of whoever waits for it."""

    def __init__(self, **record: Any) -> None:
        facts: dict[str, Any] = dict.fromkeys(CallRecord._fields)
        facts |= {"id": CALL, "state": "running", "deployment": "Echo", "method": "run", "attempts": 1, "error": ""}
        self.record: CallRecord | None = CallRecord(**facts | record)
        self.outcome: Outcome | None = None
        self.verdict: Any = CALL
        self.answer: Any = b"done"
        self.watched: list[str] = []
        self.leaving = asyncio.Event()
        self.durable = self.by_id = self.watchers = self.submissions = self
        self.is_in_doubt = False

    def of_call(self, _: str) -> "FakeDurable":
        return self

    of = of_call

    async def describe(self, call_id: str, _after: int = 0) -> CallRecord | None:
        return self.record if call_id == CALL else None

    async def parts(self, _record: CallRecord, _after: int) -> list[Any]:
        return []

    @asynccontextmanager
    async def of_news(self, _: str) -> AsyncIterator[asyncio.Event]:
        yield asyncio.Event()

    def open(self, frame: bytes, call_id: str) -> Reply:
        return Reply(call_id, "", VALUE, frame)

    def cancel(self, _: str, on_answer: Any) -> None:
        on_answer(self.answer)
        on_answer("an answer that comes twice")

    def watch(self, call_id: str, watcher: CallWatcher) -> None:
        self.watched.append(call_id)
        if self.outcome is not None:
            watcher.on_outcome(self.outcome)

    attach = watch

    def forget(self, call_id: str, _: CallWatcher) -> None:
        if call_id in self.watched:
            self.watched.remove(call_id)

    def prepare(self, _: str, *, on_admitted: Any, options: Any, **__: Any) -> Any:
        self.options = options
        call = SimpleNamespace(id=CALL)
        return SimpleNamespace(call=call, on_admitted=on_admitted, is_in_doubt=self.is_in_doubt)

    def submit(self, submission: Any) -> None:
        if self.verdict is None:
            return
        submission.on_admitted(self.verdict)
        submission.on_admitted("a verdict that comes twice")

    # What a client does

    async def page(self, method: str = "GET", query: str = "", rest: str = "", call_id: str = CALL) -> Any:
        scope: Scope = {"method": method, "query_string": query.encode(), "headers": [(b"last-event-id", b"7")]}
        stand_in: Any = self
        news: Any = SimpleNamespace(of=self.of_news)
        pages = DurablePages(stand_in, news, self.leaving, debug=False)
        try:
            return await asyncio.wait_for(pages.page(scope, f"/-/calls/{call_id}{rest}", "one"), 10)
        finally:
            assert self.watched == []

    async def send(
        self,
        wait_s: float | None,
        key: bytes = b"",
        applied: bytes = b"",
        credentials: tuple[bytes, ...] = (),
        ends: bool = True,
        **request: Any,
    ) -> HttpResponse:
        stand_in: Any = self
        asked = HttpRequest("POST", "/x", b"/x", b"", [], "", "http", None, None, "1.1", "one", b"")
        asked = msgspec.structs.replace(asked, **request)
        timeout_s = 0.01 if ends else LONGEST_WAIT_S
        route: Any = SimpleNamespace(deployment="Echo", meta={}, timeout_s=timeout_s, when_full=Backpressure(429, 7))
        requests = DurableRequests(stand_in, self.leaving, debug=False)
        try:
            return await requests.submit(route, asked, Preference(wait_s, key, applied, credentials), "/root")
        finally:
            assert self.watched == []


RESULT = Reply(CALL, "", VALUE, CODEC.pack({"sum": 3}))
RESPONSE = Reply(CALL, "", HTTP_RESPONSE, encode(HttpResponse(201, [(b"x", b"1")], b"made")))
FAILED = Reply(CALL, "", ERROR, encode(ErrorInfo("", "KeyError", "builtins", "'x'")))


class Opaque:
    """Comes only as a pickle."""


def said(response: HttpResponse) -> Any:
    return msgspec.json.decode(response.body)


async def test_a_call_that_goes_on_is_202_with_what_it_reported() -> None:
    durable = FakeDurable(progress=CODEC.pack(0.5))
    shown = await durable.page()
    assert shown.status == 202
    assert (said(shown)["state"], said(shown)["progress"]) == ("running", 0.5)
    assert said(await FakeDurable(progress=CODEC.pack(Opaque())).page())["progress"] is None


@pytest.mark.parametrize(
    ("outcome", "facts"),
    [
        (RESULT, {"result": {"sum": 3}, "error": None}),
        (RESPONSE, {"response": {"status": 201, "headers": [["x", "1"]], "body": "made"}}),
        (
            Reply(CALL, "", HTTP_RESPONSE, encode(HttpResponse(200, [], b"\xff"))),
            {"response": {"status": 200, "headers": [], "body_base64": "/w=="}},
        ),
        (Reply(CALL, "", VALUE, CODEC.pack({(1, 2): 3})), {"result": "{(1, 2): 3}"}),
        (Reply(CALL, "", VALUE, CODEC.pack("\ud800")), {"result": "'\\ud800'"}),
        (FAILED, {"error": "'x'"}),
        (Reply(CALL, "", VALUE, CODEC.pack(Opaque())), {"error": None}),
    ],
    ids=["a result", "a response", "bytes", "keys that JSON does not know", "half a pair", "an error", "a pickle"],
)
async def test_a_call_that_has_ended_is_200_with_its_outcome(outcome: Reply, facts: dict[str, Any]) -> None:
    durable = FakeDurable(state="done")
    durable.outcome = outcome
    shown = await durable.page()
    assert shown.status == 200
    assert said(shown) | facts == said(shown)
    assert ("result" in said(shown)) is ("result" in facts)


async def test_the_response_itself_can_be_had() -> None:
    durable = FakeDurable(state="done")
    for outcome, status, body in ((RESPONSE, 201, b"made"), (RESULT, 200, b'{"sum":3}')):
        durable.outcome = outcome
        shown = await durable.page(query="response=true")
        assert (shown.status, shown.body) == (status, body)
    durable.outcome = FAILED
    assert (await durable.page(query="response=1")).status == 500
    durable.outcome = Reply(CALL, "", VALUE, CODEC.pack(Opaque()))
    with pytest.raises(ResultNotSerializable, match=f"get_ref\\('{CALL}'\\)` gives it to a Python program"):
        await durable.page(query="response=true")


@pytest.mark.parametrize("wait", ["0.01", "x", "nan", "-1"])
async def test_whoever_waits_is_answered_in_time_without_an_outcome(wait: str) -> None:
    began = time.monotonic()
    assert (await FakeDurable().page(query=f"wait={wait}&response=true")).status == 202
    assert time.monotonic() - began < LONGEST_WAIT_S / 2


async def test_whoever_waits_sees_the_record_of_after_the_end() -> None:
    durable = FakeDurable()
    durable.outcome = RESULT
    assert said(await durable.page(query="wait=inf"))["result"] == {"sum": 3}


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [(b"done", 200, b"cancelled"), (b"asked", 202, b"cancelling"), (b"ended", 409, b"The call has ended already.")],
)
async def test_a_call_is_cancelled(answer: bytes, status: int, body: bytes) -> None:
    durable = FakeDurable()
    durable.answer = answer
    shown = await durable.page("DELETE")
    assert (shown.status, shown.body) == (status, body)


async def test_a_call_that_is_unknown_is_not_found_and_a_broken_connection_is_said() -> None:
    durable = FakeDurable()
    durable.answer = b"unknown"
    for asked in ({"method": "DELETE"}, {"call_id": EARLIER}, {"call_id": "x"}, {"rest": "/other"}):
        with pytest.raises(CallNotFound):
            await durable.page(**asked)
    durable.answer = BrokerUnavailable("away")
    with pytest.raises(BrokerUnavailable, match="away"):
        await durable.page("DELETE")
    durable.outcome = CallNotFound("expired meanwhile")
    with pytest.raises(CallNotFound, match="expired meanwhile"):
        await durable.page(query="wait=1")
    for method in ("GET", "HEAD"):
        assert isinstance(await durable.page(method, rest="/events"), EventStream)


@pytest.mark.parametrize(
    ("method", "rest", "allowed"),
    [("PUT", "", b"GET, HEAD, DELETE"), *((method, "/events", b"GET, HEAD") for method in ("POST", "PUT", "DELETE"))],
)
async def test_other_methods_are_not_allowed(method: str, rest: str, allowed: bytes) -> None:
    answer = await FakeDurable().page(method, rest=rest)
    assert (answer.status, dict(answer.headers)[b"allow"]) == (405, allowed)


class Reader:
    """The server's side of a response."""

    def __init__(self) -> None:
        self.got: list[Message] = []

    async def receive(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Message) -> None:
        self.got.append(message)


async def test_the_events_of_a_call_end_when_the_gateway_leaves() -> None:
    """Their reader goes on at another one."""
    durable, reader = FakeDurable(events=[], last_number=0), Reader()
    stream = await durable.page(rest="/events")
    writing = asyncio.create_task(stream.write(reader.send, reader.receive, "GET", "one"))
    await until(lambda: len(reader.got) == 2)
    assert not writing.done()
    durable.leaving.set()
    await asyncio.wait_for(writing, patience(5))
    assert [message.get("more_body") for message in reader.got] == [None, True, True, None]


@pytest.mark.parametrize(("state", "last", "goes_on"), [("done", 7, False), ("done", 8, True), ("running", 7, True)])
async def test_who_has_the_events_of_a_call_that_has_ended_is_told_not_to_come_back(
    state: str, last: int, goes_on: bool
) -> None:
    """An `EventSource` comes back every few seconds otherwise."""
    answer = await FakeDurable(state=state, last_number=last).page(rest="/events")  # it has the first seven
    assert isinstance(answer, EventStream) if goes_on else (answer.status, answer.body) == (204, b"")


# Requests that become durable calls


@pytest.mark.parametrize(
    ("headers", "preference"),
    [
        ([], None),
        ([(b"prefer", b"return=minimal, wait=soon")], None),
        ([(b"prefer", b"respond-async")], Preference(0.0, b"", b"respond-async")),
        ([(b"prefer", b'Respond-Async; x, wait="5"')], Preference(5.0, b"", b"respond-async, wait=5")),
        ([(b"prefer", b"wait=100")], Preference(LONGEST_WAIT_S, b"", b"wait=100")),
        ([(b"idempotency-key", b" k "), (b"accept", b"x")], Preference(None, b"k", b"")),
        ([(b"idempotency-key", b"k"), (b"x-api-key", b"me")], Preference(None, b"k", b"", (b"me",))),
    ],
)
def test_what_headers_ask_for(headers: list[tuple[bytes, bytes]], preference: Preference | None) -> None:
    assert preference_of(headers) == preference


@pytest.mark.parametrize("key", [b"", b"  ", b"k" * 256])
def test_a_key_that_is_none_is_refused(key: bytes) -> None:
    with pytest.raises(Refused) as refused:
        preference_of([(b"idempotency-key", key)])
    assert refused.value.response.status == 400


async def test_a_request_is_answered_as_its_client_prefers() -> None:
    durable = FakeDurable()
    later = await durable.send(0.0, applied=b"respond-async")
    assert (later.status, said(later)) == (202, {"id": CALL, "location": f"/root/-/calls/{CALL}"})
    late = await durable.send(None)
    assert (late.status, dict(late.headers)[b"location"]) == (504, f"/root/-/calls/{CALL}".encode())
    durable.outcome = RESPONSE
    at_once = await durable.send(5.0, applied=b"wait=5")
    assert (at_once.status, at_once.headers) == (201, [(b"x", b"1"), (b"preference-applied", b"wait=5")])
    durable.verdict = EARLIER
    again = await durable.send(None, b"k")
    assert again.headers == [(b"x", b"1"), (b"idempotent-replayed", b"true")]
    durable.verdict = BrokerUnavailable("away")
    assert (await durable.send(5.0)).status == 503
    durable.verdict = BackPressureError("full")
    full = await durable.send(5.0)
    assert (full.status, dict(full.headers)[b"retry-after"]) == (429, b"7")


@pytest.mark.parametrize(("key", "status", "again"), [(b"", 502, None), (b"k", 503, b"1")])
async def test_who_asks_for_a_call_that_redis_does_not_confirm_is_told_where_its_response_may_be(
    key: bytes, status: int, again: bytes | None
) -> None:
    """Only who names the call may send it again: it may run."""
    durable = FakeDurable()
    durable.verdict, durable.is_in_doubt = BrokerUnavailable("not known"), True
    response = await durable.send(0.0, key, applied=b"respond-async")
    headers = dict(response.headers)
    assert (response.status, headers.get(b"retry-after")) == (status, again)
    assert headers[b"location"] == f"/root/-/calls/{CALL}".encode()


@pytest.mark.parametrize(
    ("verdict", "wait_s", "key", "status"),
    [(CALL, 30.0, b"", 202), (CALL, None, b"k", 504), (EARLIER, None, b"k", 504), (None, 30.0, b"", 502)],
    ids=["it would take a 202", "it would not", "it is an earlier call", "nobody knows whether it was accepted"],
)
async def test_a_gateway_that_leaves_says_where_the_response_of_a_call_will_be(
    verdict: str | None, wait_s: float | None, key: bytes, status: int
) -> None:
    durable = FakeDurable()
    durable.verdict = verdict
    sending = asyncio.create_task(durable.send(wait_s, key, ends=False))
    await until(lambda: bool(durable.watched))
    durable.leaving.set()
    sending.cancel()
    response = await sending
    assert (response.status, dict(response.headers)[b"location"].decode()) == (
        status,
        f"/root/-/calls/{verdict or CALL}",
    )
    assert b"retry-after" not in dict(response.headers)


@pytest.mark.parametrize(("verdict", "key", "leaves"), [(CALL, b"", False), (None, b"", False), (None, b"k", True)])
async def test_what_may_be_sent_again_is_cancelled(verdict: str | None, key: bytes, leaves: bool) -> None:
    durable = FakeDurable()
    durable.verdict = verdict
    sending = asyncio.create_task(durable.send(30.0, key))
    await until(lambda: bool(durable.watched))
    if leaves:
        durable.leaving.set()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending


async def test_a_key_belongs_to_whoever_sent_it_and_to_one_body() -> None:
    durable = FakeDurable()
    seen = []
    for key, request in (
        (b"k", {}),
        (b"k", {"body": b"other"}),
        (b"k", {"credentials": (b"me",)}),
        (b"j", {}),
    ):
        await durable.send(0.0, key, b"respond-async", **request)
        seen.append((durable.options.idempotency, durable.options.body_hash))
    assert len({who for who, _ in seen}) == 3
    assert seen[0][0] == seen[1][0]
    assert seen[0][1] != seen[1][1] != seen[2][1]
    assert durable.options.key == "j"


async def test_api_keys_that_no_deployment_sees_keep_the_same_key_of_two_clients_apart() -> None:
    durable = FakeDurable()
    stand_in: Any = durable
    keys = load_api_keys(Settings(api_keys="alice,bob"))
    gateway = Gateway(FakeCalls(), Settings(), keys, DurableRequests(stand_in, asyncio.Event(), debug=False))
    gateway.use_deployments(
        [DeploymentSpec(name="Echo", target=Target("module:name"), revision="1", route_prefix="/echo")]
    )
    seen = []
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://test") as http:
        for credentials in (
            {"x-api-key": "alice"},
            {"x-api-key": "bob"},
            {"authorization": "Bearer alice"},
            {"x-api-key": "bob", "connection": "x-api-key"},
        ):
            headers = {"idempotency-key": "order-1", "prefer": "respond-async", **credentials}
            assert (await http.post("/echo", headers=headers)).status_code == 202
            seen.append(durable.options.idempotency)
    assert len({*seen}) == 3
    assert seen[1] == seen[3]
