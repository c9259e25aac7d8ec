"""Pages about durable calls: what stands under /-/calls/."""

import asyncio
import base64
import contextlib
from typing import Any
from urllib.parse import parse_qs

import msgspec
from starlette.types import Scope

from qserve.broker.call_news import CallNews
from qserve.calls.client import Client
from qserve.durable.durable_client import DurableCalls
from qserve.errors import CallNotFound, QServeError, ResultNotSerializable
from qserve.wire.call_record import ENDS, CallRecord, is_call_id
from qserve.wire.messages import ERROR, HTTP_RESPONSE, HttpResponse, Outcome, Reply, decode_error
from qserve_gateway.durable.durable_events import EventStream
from qserve_gateway.durable.durable_requests import LONGEST_WAIT_S, PATH, OutcomeWait
from qserve_gateway.durable.json_values import plain_value
from qserve_gateway.respond import JSON, outcome_response, text_response


class DurablePages:
    """Answers what clients ask about durable calls.

    Args:
        client: Knows the calls.
        news: Wakes those who follow a call.
        leaving: Set when the gateway leaves.
        debug: Put the tracebacks of user code into responses.
    """

    def __init__(self, client: Client, news: CallNews, leaving: asyncio.Event, *, debug: bool) -> None:
        self._client = client
        self._news = news
        self._leaving = leaving
        self._debug = debug

    async def page(self, scope: Scope, name: str, request_id: str) -> HttpResponse | EventStream:
        """Answer a request for /-/calls/ID or /-/calls/ID/events.

        Raises:
            CallNotFound: There is no such call.
        """
        method = scope["method"]
        call_id, _, rest = name.removeprefix(PATH).partition("/")
        if not is_call_id(call_id) or rest not in ("", "events"):
            raise CallNotFound(f"there is no durable call {call_id[:100]!r}")
        if method == "DELETE" and not rest:
            return await self._cancel(call_id)
        if method not in ("GET", "HEAD"):
            return _not_allowed("GET, HEAD" if rest else "GET, HEAD, DELETE")
        if rest:
            return await self._events(scope, call_id)
        query = parse_qs(scope["query_string"].decode("latin-1"))
        return await self._show(call_id, query, request_id)

    async def _show(self, call_id: str, query: dict[str, list[str]], request_id: str) -> HttpResponse:
        record = await self._record(call_id)
        patience = LONGEST_WAIT_S if record.state in ENDS else _seconds(query.get("wait", ["0"])[-1])
        outcome = await self._outcome(call_id, patience) if patience else None
        if outcome is not None and record.state not in ENDS:
            record = await self._record(call_id)
        if query.get("response", ["false"])[-1].lower() in ("true", "1") and outcome is not None:
            return self._response(outcome, request_id)
        status = 200 if record.state in ENDS else 202
        return HttpResponse(
            status, [JSON, (b"cache-control", b"no-store")], _describe(record, outcome, self._durable(call_id))
        )

    def _durable(self, call_id: str) -> DurableCalls:
        return self._client.of_call(call_id).durable

    async def _record(self, call_id: str) -> CallRecord:
        record = await self._durable(call_id).by_id.describe(call_id)
        if record is None:
            raise CallNotFound(f"there is no durable call {call_id!r}, or its record has expired")
        return record

    async def _outcome(self, call_id: str, timeout_s: float) -> Outcome | None:
        wait = OutcomeWait(self._durable(call_id))
        wait.attach(call_id)
        try:
            return await wait.outcome(timeout_s)
        finally:
            wait.end()

    def _response(self, outcome: Outcome, request_id: str) -> HttpResponse:
        if isinstance(outcome, Reply) and outcome.kind not in (HTTP_RESPONSE, ERROR):
            try:
                return HttpResponse(200, [JSON], msgspec.json.encode(plain_value(outcome.payload)))
            except QServeError:
                raise ResultNotSerializable(
                    f"the call has returned a Python object that JSON cannot express: `serve.get_ref({outcome.id!r})` "
                    "gives it to a Python program"
                ) from None
        return outcome_response(outcome, request_id, debug=self._debug)

    async def _cancel(self, call_id: str) -> HttpResponse:
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def on_answer(answer: Any) -> None:
            if not answered.done():
                answered.set_result(answer)

        self._durable(call_id).by_id.cancel(call_id, on_answer)
        answer = await answered
        if isinstance(answer, Exception):
            raise answer
        if answer == b"unknown":
            raise CallNotFound(f"there is no durable call {call_id!r}, or its record has expired")
        if answer == b"ended":
            return text_response(409, "The call has ended already.")
        return text_response(200, "cancelled") if answer == b"done" else text_response(202, "cancelling")

    async def _events(self, scope: Scope, call_id: str) -> HttpResponse | EventStream:
        record = await self._record(call_id)
        last = next((value for name, value in scope["headers"] if name == b"last-event-id"), b"")
        after = int(last[:15]) if last.isdigit() else 0
        if record.state in ENDS and after >= record.last_number:
            return HttpResponse(204, [(b"cache-control", b"no-store")], b"")  # else an EventSource would ask for ever
        return EventStream(self._durable(call_id), self._news, self._leaving, call_id, after)


def _not_allowed(methods: str) -> HttpResponse:
    return text_response(405, f"Only {methods}.", (b"allow", methods.encode()))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT_S) if seconds == seconds else 0.0  # noqa: PLR0124  not NaN


def _describe(record: CallRecord, outcome: Outcome | None, durable: DurableCalls) -> bytes:
    shown: dict[str, Any] = {
        "id": record.id,
        "state": record.state,
        "deployment": record.deployment,
        "method": record.method,
        "attempts": record.attempts,
        "position": record.position,
        "submitted": record.submitted,
        "started": record.started,
        "ended": record.ended,
        "due": record.due,
        "error": record.error or None,
        "progress": None,
    }
    if record.progress is not None:
        with contextlib.suppress(QServeError, msgspec.DecodeError):
            shown["progress"] = plain_value(durable.by_id.open(record.progress, record.id).payload)
    if isinstance(outcome, Reply):
        if outcome.kind == HTTP_RESPONSE:
            shown["response"] = _shown_response(outcome_response(outcome, "", debug=False))
        elif outcome.kind == ERROR:
            shown["error"] = shown["error"] or decode_error(outcome.payload).message
        else:
            with contextlib.suppress(QServeError):
                shown["result"] = plain_value(outcome.payload)
    return msgspec.json.encode(shown)


def _shown_response(response: HttpResponse) -> dict[str, Any]:
    headers = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in response.headers]
    shown: dict[str, Any] = {"status": response.status, "headers": headers}
    try:
        shown["body"] = response.body.decode()
    except UnicodeDecodeError:
        shown["body_base64"] = base64.b64encode(response.body).decode()
    return shown
