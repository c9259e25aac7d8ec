"""Requests that become durable calls: their response may be fetched later, by whoever knows the call's id."""

import asyncio
import contextlib
import hashlib
from typing import NamedTuple

import msgspec

from qserve.calls.client import Client
from qserve.durable.durable_client import DurableCalls
from qserve.durable.submitting import Submission
from qserve.durable.watching import CallWatcher
from qserve.errors import CallNotFound, GetTimeoutError, Indeterminate, QServeError
from qserve.wire.call_record import IDEMPOTENCY_TTL_S, DurableOptions, Terms
from qserve.wire.messages import HTTP, HttpRequest, HttpResponse, Outcome, encode
from qserve_gateway.headers import Headers
from qserve_gateway.respond import JSON, bad_request, local_error_response, may_have_run, outcome_response
from qserve_gateway.routes import Route

LONGEST_WAIT_S = 60.0
"""How long a request may wait for a call to end."""
PATH = "/-/calls/"
"""Where the pages of durable calls begin."""
_LONGEST_KEY = 255
_NOT_TWICE = "; it may still run: send the request again only if running it twice does no harm"


class Preference(NamedTuple):
    """How a client wants its durable call to be answered.

    Attributes:
        wait_s: Seconds it waits for the response before it takes a 202; None for as long as any other request waits.
        idempotency_key: Names the call, so that a repeated request is the same call; b"" without one.
        applied: What the header Preference-Applied of the response says.
        credentials: Whose key it is.
    """

    wait_s: float | None
    idempotency_key: bytes
    applied: bytes
    credentials: tuple[bytes, ...] = ()


def preference_of(headers: Headers) -> Preference | None:
    """Read the headers Prefer and Idempotency-Key; None where they ask for nothing but an ordinary call.

    Args:
        headers: All that the client has sent, also those that the deployment does not get, such as an API key.

    Raises:
        Refused: The key is empty or longer than 255 characters.
    """
    key: bytes | None = None
    respond_async, wait_s = False, None
    for name, value in headers:
        if name == b"idempotency-key":
            key = value.strip()
            if not 0 < len(key) <= _LONGEST_KEY:
                raise bad_request("an Idempotency-Key has 1 to 255 characters")
        elif name == b"prefer":
            for each in value.lower().split(b","):
                token, _, number = each.partition(b";")[0].partition(b"=")
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
    return Preference(patience, key or b"", b", ".join(applied), _credentials(headers) if key else ())


class DurableRequests:
    """Submits requests as durable calls.

    Args:
        client: Submits calls.
        leaving: Set when the gateway leaves: a request that is cancelled then is still to be answered.
        debug: Put the tracebacks of user code into responses.
    """

    def __init__(self, client: Client, leaving: asyncio.Event, *, debug: bool) -> None:
        self._client = client
        self._leaving = leaving
        self._debug = debug

    async def submit(self, route: Route, request: HttpRequest, preference: Preference, root_path: str) -> HttpResponse:
        """Submit a request, and wait for its response as long as its client prefers.

        Raises:
            CancelledError: The request is cancelled. Where the gateway leaves, the client is told in its place where
                the response will be, unless the request may be sent again.
        """
        admitted: asyncio.Future[str | QServeError] = asyncio.get_running_loop().create_future()

        def on_admitted(verdict: str | QServeError) -> None:
            if not admitted.done():
                admitted.set_result(verdict)

        durable = self._client.of(route.deployment).durable
        submission = durable.submissions.prepare(
            route.deployment,
            kind=HTTP,
            method="",
            payload=encode(request),
            options=_options(request, preference),
            on_admitted=on_admitted,
            meta=route.meta,
        )
        wait = OutcomeWait(durable)
        wait.watch(submission.call.id)
        call_id, outcome = "", None
        try:
            durable.submissions.submit(submission)
            verdict = await admitted
            if isinstance(verdict, QServeError):
                return _told_where(self._response(verdict, request, route), verdict, preference, submission, root_path)
            call_id = verdict
            if call_id != submission.call.id:
                wait.attach(call_id)
            outcome = await wait.outcome(route.timeout_s if preference.wait_s is None else preference.wait_s)
        except asyncio.CancelledError:
            may_be_repeated = not call_id and preference.idempotency_key
            if may_be_repeated or not self._leaving.is_set():
                raise
        finally:
            wait.end()
        if not call_id:
            return _error_with_location(may_have_run(), _location(submission.call.id, root_path))
        if outcome is None:
            return _not_yet(call_id, preference, root_path)
        response = self._response(outcome, request, route)
        extra = [(b"preference-applied", preference.applied)] if preference.applied else []
        if call_id != submission.call.id:
            extra.append((b"idempotent-replayed", b"true"))
        return HttpResponse(response.status, [*response.headers, *extra], response.body)

    def _response(self, outcome: Outcome, request: HttpRequest, route: Route) -> HttpResponse:
        return outcome_response(outcome, request.request_id, debug=self._debug, when_full=route.when_full)


def _not_yet(call_id: str, preference: Preference, root_path: str) -> HttpResponse:
    location = _location(call_id, root_path)
    if preference.wait_s is None:
        return _error_with_location(GetTimeoutError("there is no response yet; the call goes on"), location)
    body = msgspec.json.encode({"id": call_id, "location": location})
    headers = [JSON, (b"location", location.encode()), (b"preference-applied", preference.applied)]
    return HttpResponse(202, headers, body)


def _told_where(
    response: HttpResponse, error: QServeError, preference: Preference, refused: Submission, root_path: str
) -> HttpResponse:
    """The response to who is refused; for a call that may run all the same, which only who names it may send again."""
    if not refused.is_in_doubt:
        return response
    in_doubt = error if preference.idempotency_key else Indeterminate(f"{error}{_NOT_TWICE}")
    return _error_with_location(in_doubt, _location(refused.call.id, root_path))


def _error_with_location(error: QServeError, location: str) -> HttpResponse:
    response = local_error_response(error)
    return HttpResponse(response.status, [*response.headers, (b"location", location.encode())], response.body)


def _location(call_id: str, root_path: str) -> str:
    return f"{root_path}{PATH}{call_id}"


class OutcomeWait:
    """Waits for the outcome of one durable call."""

    def __init__(self, durable: DurableCalls) -> None:
        self._durable = durable
        self._call_id = ""
        self._future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._watcher = CallWatcher(self._settle, lambda _: None)

    def watch(self, call_id: str) -> None:
        """Wait for a call that is about to be submitted."""
        self._call_id = call_id
        self._durable.watchers.watch(call_id, self._watcher)

    def attach(self, call_id: str) -> None:
        """Wait for any call, instead of the one before."""
        self.end()
        self._call_id = call_id
        self._durable.watchers.attach(call_id, self._watcher)

    async def outcome(self, timeout_s: float) -> Outcome | None:
        """Wait for the outcome; None if it does not come in time.

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
        """Stop waiting."""
        self._durable.watchers.forget(self._call_id, self._watcher)

    def _settle(self, outcome: Outcome) -> None:
        if not self._future.done():
            self._future.set_result(outcome)


def _options(request: HttpRequest, preference: Preference) -> DurableOptions:
    if not preference.idempotency_key:
        return DurableOptions()
    who = hashlib.sha256()
    # The same key of somebody else is another key.
    for part in (request.root_path.encode(), preference.idempotency_key, *preference.credentials):
        who.update(b"%d:%b" % (len(part), part))
    what = hashlib.sha256()
    for part in (request.method.encode(), request.path.encode(), request.query_string, request.body):
        what.update(b"%d:%b" % (len(part), part))
    terms = Terms(result_ttl_s=IDEMPOTENCY_TTL_S)
    key = preference.idempotency_key.decode("latin-1")
    return DurableOptions(terms=terms, idempotency=who.hexdigest(), body_hash=what.hexdigest(), key=key)


def _credentials(headers: Headers) -> tuple[bytes, ...]:
    return tuple(value for name, value in headers if name in (b"authorization", b"x-api-key"))
