"""Durable calls over HTTP: requests that are answered later, to whoever knows the call's id."""

import asyncio
import base64
import contextlib
import hashlib
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import msgspec
from starlette.types import Scope

from qserve.durable.submitting import DurableCalls, Outcome, Watcher
from qserve.errors import CallNotFound, GetTimeoutError, QServeError
from qserve.wire.call_record import ENDS, IDEMPOTENCY_TTL_S, CallRecord, Options, Terms, is_call_id
from qserve.wire.messages import ERROR, HTTP, HTTP_RESPONSE, HttpRequest, HttpResponse, Reply, decode_error, encode
from qserve_gateway.durable.call_events import EventStream, News
from qserve_gateway.durable.json_values import plain_value
from qserve_gateway.headers import Headers
from qserve_gateway.respond import JSON, local_error_response, outcome_response, text_response
from qserve_gateway.routes import Route

LONGEST_WAIT_S = 60.0
PATH = "/-/calls/"
_LONGEST_KEY = 255


class Wish(NamedTuple):
    """How a client wants to be answered.

    Attributes:
        wait_s: Seconds it waits for the response before it takes a 202; None: as long as any other request waits.
        idempotency_key: b"" without one.
        applied: For the header Preference-Applied.
    """

    wait_s: float | None
    idempotency_key: bytes
    applied: bytes


def wish_of(headers: Headers) -> Wish | None:
    """What the headers Prefer and Idempotency-Key ask for; None: an ordinary call.

    Raises:
        ValueError: The key is empty or longer than 255 characters.
    """
    key: bytes | None = None
    respond_async, wait_s = False, None
    for name, value in headers:
        if name == b"idempotency-key":
            key = value.strip()
            if not 0 < len(key) <= _LONGEST_KEY:
                raise ValueError("an Idempotency-Key has 1 to 255 characters")
        elif name == b"prefer":
            for preference in value.lower().split(b","):
                token, _, number = preference.partition(b";")[0].partition(b"=")
                if token.strip() == b"respond-async":
                    respond_async = True
                elif token.strip() == b"wait" and number.strip(b' "').isdigit():
                    wait_s = float(number.strip(b' "')[:9])
    if not respond_async and wait_s is None and key is None:
        return None
    applied = [b"respond-async"] if respond_async else []
    if wait_s is not None:
        applied.append(b"wait=%d" % wait_s)
    patience = min(wait_s, LONGEST_WAIT_S) if wait_s is not None else 0.0 if respond_async else None
    return Wish(patience, key or b"", b", ".join(applied))


class CallPages:
    """Submits requests as durable calls, and answers what is asked about them under /-/calls/.

    Args:
        durable: Of the gateway's client.
        debug: Put tracebacks into bodies.
    """

    def __init__(self, durable: DurableCalls, news: News, *, debug: bool) -> None:
        self._durable = durable
        self._news = news
        self._debug = debug

    # Submitting

    async def submit(self, route: Route, request: HttpRequest, wish: Wish, root_path: str) -> HttpResponse:
        """Submit a request, and wait for its response as long as its client wishes."""
        loop = asyncio.get_running_loop()
        admitted: asyncio.Future[str | QServeError] = loop.create_future()

        def on_admitted(verdict: str | QServeError) -> None:
            if not admitted.done():
                admitted.set_result(verdict)

        submission = self._durable.prepare(
            route.deployment,
            kind=HTTP,
            method="",
            payload=encode(request),
            options=_options(request, wish),
            on_admitted=on_admitted,
        )
        wait = _Wait(self._durable)
        wait.watch(submission.call.id)
        try:
            self._durable.submit(submission)
            verdict = await admitted
            if isinstance(verdict, QServeError):
                return local_error_response(verdict)
            is_first = verdict == submission.call.id
            if not is_first:
                wait.attach(verdict)
            outcome = await wait.outcome(route.timeout_s if wish.wait_s is None else wish.wait_s)
        finally:
            wait.end()
        if outcome is None:
            return self._not_yet(verdict, wish, root_path)
        response = outcome_response(outcome, request.request_id, debug=self._debug)
        extra = [(b"preference-applied", wish.applied)] if wish.applied else []
        if not is_first:
            extra.append((b"idempotent-replayed", b"true"))
        return HttpResponse(response.status, [*response.headers, *extra], response.body)

    @staticmethod
    def _not_yet(call_id: str, wish: Wish, root_path: str) -> HttpResponse:
        location = (b"location", f"{root_path}{PATH}{call_id}".encode())
        if wish.wait_s is None:
            late = local_error_response(GetTimeoutError("there is no response yet; the call goes on"))
            return HttpResponse(late.status, [*late.headers, location], late.body)
        body = msgspec.json.encode({"id": call_id, "location": location[1].decode()})
        return HttpResponse(202, [JSON, location, (b"preference-applied", wish.applied)], body)

    # Asking

    async def page(self, scope: Scope, name: str, request_id: str) -> "HttpResponse | EventStream":
        """What stands under /-/calls/ID and /-/calls/ID/events."""
        method = scope["method"]
        call_id, _, rest = name.removeprefix(PATH).partition("/")
        if not is_call_id(call_id) or rest not in ("", "events"):
            raise CallNotFound(f"there is no durable call {call_id[:100]!r}")
        if rest == "events":
            return await self._events(scope, call_id)
        if method == "DELETE":
            return await self._cancel(call_id)
        if method not in ("GET", "HEAD"):
            return text_response(405, "Only GET, HEAD and DELETE.", (b"allow", b"GET, HEAD, DELETE"))
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
        return HttpResponse(status, [JSON, (b"cache-control", b"no-store")], _describe(record, outcome, self._durable))

    async def _record(self, call_id: str) -> CallRecord:
        record = await self._durable.describe(call_id)
        if record is None:
            raise CallNotFound(f"there is no durable call {call_id!r} (any more)")
        return record

    async def _outcome(self, call_id: str, timeout_s: float) -> Outcome | None:
        wait = _Wait(self._durable)
        wait.attach(call_id)
        try:
            return await wait.outcome(timeout_s)
        finally:
            wait.end()

    def _response(self, outcome: Outcome, request_id: str) -> HttpResponse:
        if isinstance(outcome, Reply) and outcome.kind not in (HTTP_RESPONSE, ERROR):
            return HttpResponse(200, [JSON], msgspec.json.encode(plain_value(outcome.payload)))
        return outcome_response(outcome, request_id, debug=self._debug)

    async def _cancel(self, call_id: str) -> HttpResponse:
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def on_answer(answer: Any) -> None:
            if not answered.done():
                answered.set_result(answer)

        self._durable.cancel(call_id, on_answer)
        answer = await answered
        if isinstance(answer, Exception):
            raise answer
        if answer == b"unknown":
            raise CallNotFound(f"there is no durable call {call_id!r} (any more)")
        if answer == b"ended":
            return text_response(409, "The call has ended already.")
        return text_response(200, "cancelled") if answer == b"done" else text_response(202, "cancelling")

    async def _events(self, scope: Scope, call_id: str) -> EventStream:
        await self._record(call_id)
        last = next((value for name, value in scope["headers"] if name == b"last-event-id"), b"")
        return EventStream(self._durable, self._news, call_id, int(last[:15]) if last.isdigit() else 0)


class _Wait:
    """Waits for the outcome of one call."""

    def __init__(self, durable: DurableCalls) -> None:
        self._durable = durable
        self._call_id = ""
        self._future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._watcher = Watcher(self._settle, lambda _: None)

    def watch(self, call_id: str) -> None:
        """Wait for a call that is about to be submitted."""
        self._call_id = call_id
        self._durable.watch(call_id, self._watcher)

    def attach(self, call_id: str) -> None:
        """Wait for any call, instead of the one before."""
        self.end()
        self._call_id = call_id
        self._durable.attach(call_id, self._watcher)

    async def outcome(self, timeout_s: float) -> Outcome | None:
        """The outcome, None if it does not come in time.

        Raises:
            CallNotFound: There is no such call.
        """
        if not timeout_s:
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                outcome = await asyncio.shield(self._future)
                if isinstance(outcome, CallNotFound):
                    raise outcome
                return outcome
        return None

    def end(self) -> None:
        """Wait no more."""
        self._durable.forget(self._call_id, self._watcher)

    def _settle(self, outcome: Outcome) -> None:
        if not self._future.done():
            self._future.set_result(outcome)


def _options(request: HttpRequest, wish: Wish) -> Options:
    if not wish.idempotency_key:
        return Options()
    who = hashlib.sha256()
    # The same key of somebody else is another key.
    for part in (request.root_path.encode(), wish.idempotency_key, *_credentials(request.headers)):
        who.update(b"%d:%b" % (len(part), part))
    what = hashlib.sha256()
    for part in (request.method.encode(), request.path.encode(), request.query_string, request.body):
        what.update(b"%d:%b" % (len(part), part))
    terms = Terms(result_ttl_s=IDEMPOTENCY_TTL_S)
    return Options(terms=terms, idempotency=who.hexdigest(), body_hash=what.hexdigest())


def _credentials(headers: Headers) -> list[bytes]:
    return [value for name, value in headers if name in (b"authorization", b"x-api-key")]


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
            shown["progress"] = plain_value(durable.open(record.progress, record.id).payload)
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
