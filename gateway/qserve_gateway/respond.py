"""Replies and errors as HTTP responses, and responses as ASGI messages."""

import logging
import math
import os
from enum import Enum, auto
from functools import lru_cache
from typing import Any

import msgspec
from starlette.types import Send

from qserve import errors
from qserve.errors import BackPressureError, Indeterminate, PoisonCall, QServeError, StreamBroken, TaskError
from qserve.failpoints import reach
from qserve.wire.messages import (
    ERROR,
    HTTP_RESPONSE,
    ErrorInfo,
    HttpResponse,
    Outcome,
    decode_error,
    decode_http_response,
    unpack_http,
)
from qserve.wire.options import Backpressure
from qserve.wire.parts import flat
from qserve_gateway.headers import HOP_BY_HOP, Headers, connection_tokens, has_control, is_name

logger = logging.getLogger(__name__)

DROPPED = HOP_BY_HOP | {b"date", b"server"}
"""Headers that deployments cannot set: those of the connection, which belongs to the gateway, and two of its own."""

_LEAVING = "this gateway is leaving and could not wait for the outcome"

TEXT = (b"content-type", b"text/plain; charset=utf-8")
JSON = (b"content-type", b"application/json")


def _with_subclasses(cls: type[QServeError]) -> list[type[QServeError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _with_subclasses(sub))]


_BY_CODE = {cls.__name__: cls for cls in _with_subclasses(QServeError) if cls.__module__ == errors.__name__}


class Refused(Exception):
    """The request is answered by the gateway itself and goes no further.

    Attributes:
        response: The answer.
    """

    def __init__(self, response: HttpResponse) -> None:
        super().__init__(response.status)
        self.response = response


class Unsendable(Exception):
    """A response that must not be written to a connection."""


def text_response(status: int, text: str, *headers: tuple[bytes, bytes]) -> HttpResponse:
    """Make a short answer of the gateway itself."""
    return HttpResponse(status, [TEXT, *headers], text.encode("utf-8", "replace"))


def about_to_respond() -> None:
    """Say that what became of a request is known, and is not sent yet."""
    reach("respond")


def bad_request(reason: object) -> Refused:
    """Make the exception for a request that makes no sense."""
    return Refused(text_response(400, f"Bad request: {reason}."))


def json_response(value: object) -> HttpResponse:
    """Make an answer of the gateway itself in JSON."""
    return HttpResponse(200, [JSON], msgspec.json.encode(value))


def outcome_response(
    outcome: Outcome, request_id: str, *, debug: bool, when_full: Backpressure | None = None
) -> HttpResponse:
    """Make the response for whatever became of a call."""
    if isinstance(outcome, QServeError):
        if when_full is not None and isinstance(outcome, BackPressureError):
            return _full_response(outcome, when_full)
        return local_error_response(outcome)
    if outcome.kind == HTTP_RESPONSE:
        return unpack_http(decode_http_response, outcome.payload)
    if outcome.kind == ERROR:
        return remote_error_response(decode_error(flat(outcome.payload)), request_id, debug=debug)
    # How a streamed response ends: its parts have not arrived, and will not.
    return local_error_response(
        StreamBroken("the beginning of the response was lost on its way from the replica: send the request again")
    )


def local_error_response(error: QServeError) -> HttpResponse:
    """Make the response for an error that this process found, such as a timeout."""
    retry_after = error.retry_after if isinstance(error, BackPressureError) else 1.0
    return _error_response(type(error), str(error), retry_after)


def leaving_response() -> HttpResponse:
    """Make the response to a request that cannot be finished before the gateway ends, and may be sent again."""
    text = f"{_LEAVING}: send the request again"
    return text_response(503, text, (b"retry-after", b"1"))


def may_have_run() -> Indeterminate:
    """Make the error for a call that is not safe, and whose outcome the gateway cannot wait for because it ends."""
    return Indeterminate(
        f"{_LEAVING}; the call may have run, or may still run: send it again only if running it twice does no harm"
    )


def _full_response(error: BackPressureError, told: Backpressure) -> HttpResponse:
    wait_s = error.retry_after if told.retry_after_s is None else told.retry_after_s
    header = (b"retry-after", b"%d" % max(1, math.ceil(wait_s)))
    return text_response(told.status_code, f"BackPressureError: {error}", header)


def remote_error_response(error: ErrorInfo, request_id: str, *, debug: bool) -> HttpResponse:
    """Make the response for an error that a replica has sent, of user code or of qserve."""
    cls = _BY_CODE.get(error.code, TaskError)
    if cls is not TaskError:
        return _error_response(cls, error.message, 1.0)
    text = f"Task Error. {error.type_name}. Request {request_id}; the traceback is in {the_log()}."
    if debug:
        text = f"Task Error. {error.type_name}. Request {request_id}\n\n{error.traceback_text or error.message}"
    return text_response(500, text)


def the_log() -> str:
    """What messages call the log: its file, where the node says that whoever reads them may know."""
    file = os.environ.get("QSERVE_LOG_FILE")
    return f"the log, {file}" if file else "the log"


def _error_response(cls: type[QServeError], message: str, retry_after: float) -> HttpResponse:
    text = message if cls is PoisonCall else f"{cls.__name__}: {message}"
    if cls.status == 503:
        return text_response(503, text, (b"retry-after", b"%d" % max(1, math.ceil(retry_after))))
    return text_response(cls.status, text)


async def send_response(send: Send, response: HttpResponse, method: str, request_id: str) -> None:
    """Write a response; one that could be taken for two responses, or for none, becomes a 500."""
    status, headers, body = checked(response, method, request_id)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def checked(response: HttpResponse, method: str, request_id: str) -> tuple[int, Headers, bytes]:
    """The status, the headers and the body to write for a response.

    One that could be taken for two responses, or for none, becomes a 500.
    """
    try:
        headers = _headers_to_write(response, method, request_id)
    except Unsendable as exc:
        response = sent_instead(request_id, exc)
        headers = _headers_to_write(response, method, request_id)
    empty = method == "HEAD" or response.status in {204, 304}
    return response.status, headers, b"" if empty else response.body


def sent_instead(request_id: str, reason: Unsendable) -> HttpResponse:
    """Log why a response is not sent, and make the one that is sent in its place."""
    logger.error("response to request %s not sent: %s", request_id, reason)
    return text_response(500, f"The response of request {request_id} cannot be sent; the reason is in {the_log()}.")


def start_message(response: HttpResponse, method: str, request_id: str, *, streamed: bool = False) -> dict[str, Any]:
    """Make the ASGI message that begins a response; a streamed one has the length it declares, or none.

    Raises:
        Unsendable: It could be taken for two responses, or for none.
    """
    headers = _headers_to_write(response, method, request_id, streamed=streamed)
    return {"type": "http.response.start", "status": response.status, "headers": headers}


def _headers_to_write(response: HttpResponse, method: str, request_id: str, *, streamed: bool = False) -> Headers:
    status = response.status
    if not 200 <= status <= 599:
        raise Unsendable(f"status {status}")
    headers: Headers = []
    declared = None
    identified = False
    for given, value in response.headers:
        name, fate = _fate_of(given)
        if fate is _Fate.LENGTH:
            declared = value if value.isdigit() else None
            continue
        if fate is _Fate.DROPPED:
            continue
        if fate is _Fate.CONNECTION:
            return _headers_to_write(_without_named(response), method, request_id, streamed=streamed)
        if fate is _Fate.UNSENDABLE or has_control(value) is not None:
            raise Unsendable(f"header {name[:100]!r}: {value[:100]!r}")
        identified = identified or fate is _Fate.ID
        headers.append((name, value))
    if not identified:
        headers.append((b"x-request-id", request_id.encode()))
    # A HEAD response tells the length of the body it does not have, a streamed one that of the body to come.
    length = declared if streamed or method == "HEAD" else None
    if length is None and not streamed:
        length = b"%d" % len(response.body)
    if length is not None and status not in {204, 304}:
        headers.append((b"content-length", length))
    return headers


class _Fate(Enum):
    """What becomes of a header of a response."""

    KEPT = auto()
    LENGTH = auto()
    ID = auto()
    CONNECTION = auto()
    DROPPED = auto()
    UNSENDABLE = auto()


@lru_cache(maxsize=1024)
def _fate_of(name: bytes) -> tuple[bytes, _Fate]:
    """The name of a header in lower case, and what becomes of it; applications have few names and use them again."""
    name = name.lower()
    if name in _FATES:
        return name, _FATES[name]
    return name, _Fate.KEPT if is_name(name) is not None else _Fate.UNSENDABLE


_FATES = dict.fromkeys(DROPPED, _Fate.DROPPED) | {
    b"content-length": _Fate.LENGTH,
    b"x-request-id": _Fate.ID,
    b"connection": _Fate.CONNECTION,
}


def _without_named(response: HttpResponse) -> HttpResponse:
    lowered = [(name.lower(), value) for name, value in response.headers]
    dropped = connection_tokens(lowered) | {b"connection"}
    return HttpResponse(response.status, [pair for pair in lowered if pair[0] not in dropped], response.body)
