"""What a plain deployment returns over HTTP, as an `HttpResponse`."""

import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec
from pydantic_core import PydanticSerializationError, to_jsonable_python
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from qserve.errors import ResultNotSerializable
from qserve.wire.channel import Channel
from qserve.wire.messages import HttpRequest, HttpResponse
from qserve.wire.packing import what_to_await
from qserve_workers.user.asgi import Exchange, OnComplete, http_scope, run_asgi
from qserve_workers.user.user_entry import enter

logger = logging.getLogger(__name__)

OpenChannel = Callable[[], Channel]

_PLAIN = (b"content-type", b"text/plain")
_TEXT = (b"content-type", b"text/plain; charset=utf-8")
_JSON = (b"content-type", b"application/json")
_EMPTY = HttpResponse(200, [_PLAIN, (b"content-length", b"0")], b"")


def make_request(request: HttpRequest, open_channel: OpenChannel) -> Request:
    """The Starlette request that a plain deployment is called with."""
    made = Request(http_scope(request), Exchange(request, open_channel).receive)
    if not request.body_follows:
        made._body = request.body  # it is here already: so sync code can pass the request on through a handle
    return made


async def make_response(
    result: object, request: HttpRequest, open_channel: OpenChannel, on_complete: OnComplete | None = None
) -> HttpResponse | None:
    """The response for what user code returned; None for one that was streamed.

    Args:
        on_complete: Called with the response before its background tasks run.

    Raises:
        ResultNotSerializable: It is neither a response nor text nor something JSON can say.
    """
    # In the order of likelihood; str, bytes and None need no Response object (this is the path that is measured).
    if isinstance(result, str):
        body = result.encode()
        return HttpResponse(200, [_TEXT, (b"content-length", b"%d" % len(body))], body)
    if isinstance(result, Response):
        return await _send(result, request, open_channel, on_complete)
    if isinstance(result, bytes):
        return HttpResponse(200, [_PLAIN, (b"content-length", b"%d" % len(result))], bytes(result))
    if result is None:
        return _EMPTY
    body = to_json(result)
    return HttpResponse(200, [_JSON, (b"content-length", b"%d" % len(body))], body)


def error_response(error: HTTPException) -> HttpResponse:
    """The response that user code has raised: text as it is, any other detail as FastAPI shows it.

    Raises:
        ResultNotSerializable: Its detail is nothing that JSON can say.
    """
    status = error.status_code
    headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in (error.headers or {}).items()
    ]
    if status < 200 or status in (204, 304):
        return HttpResponse(status, headers, b"")
    detail: object = error.detail
    kind, body = (_TEXT, detail.encode()) if isinstance(detail, str) else (_JSON, _compact({"detail": detail}))
    return HttpResponse(status, [kind, (b"content-length", b"%d" % len(body)), *headers], body)


async def stream_chunks(chunks: AsyncIterator[object]) -> Response:
    """What a generator yields as a response: text or bytes as they are, other values as lines of JSON."""
    try:
        first = await anext(chunks)
    except StopAsyncIteration:
        return Response(b"", media_type="text/plain")
    if isinstance(first, str | bytes):
        return StreamingResponse(_chain(first, chunks), media_type="text/plain")
    lines = (to_json_line(chunk) async for chunk in _chain(first, chunks))
    return StreamingResponse(lines, media_type="application/x-ndjson")


async def _chain(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for chunk in rest:
        yield chunk


def to_json_line(value: object) -> bytes:
    """A value as one line of JSON; raises like `to_json`."""
    return _to_json_text(value).encode() + b"\n"


def to_json(value: object) -> bytes:
    """JSON with an indent of 2, of JSON types and also of bytes, numpy values, pydantic models, exceptions and dates.

    NaN and the infinities become null.

    Raises:
        ResultNotSerializable: JSON cannot say it.
    """
    # json's own indenting is pure Python: 20 times slower than compact JSON indented by msgspec.
    return msgspec.json.format(_to_json_text(value).encode(), indent=2)


def _compact(value: object) -> bytes:
    return msgspec.json.format(_to_json_text(value).encode(), indent=-1)


def _to_json_text(value: object) -> str:
    try:
        text = _encode(value)
        if "NaN" in text or "Infinity" in text:  # Python's spelling of what JSON has no word for
            text = json.dumps(json.loads(text, parse_constant=_null))
        return text
    except (TypeError, ValueError, PydanticSerializationError) as exc:
        raise ResultNotSerializable(
            f"The call returned a {type(value).__name__} that cannot be sent as JSON: {exc}. "
            "Return JSON types, text, bytes or a Starlette Response."
        ) from exc


def _jsonable(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, BaseException):
        return str(value)
    if unawaited := what_to_await(value):
        raise TypeError(unawaited)
    if hasattr(value, "tolist"):  # numpy arrays and scalars, torch tensors
        listed = value.tolist()
        if type(listed) is type(value):  # for which Python has no number, such as numpy.longdouble
            raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} is not JSON serializable")
        return listed
    # pydantic models, dataclasses, datetime, UUID, Decimal, sets, enums, paths
    return to_jsonable_python(value, fallback=_jsonable_inside)


def _jsonable_inside(value: Any) -> Any:
    if isinstance(value, BaseException) or hasattr(value, "tolist"):
        return _jsonable(value)
    if isinstance(value, Mapping):  # Starlette's query parameters and headers, for example
        return dict(value)
    raise TypeError(
        what_to_await(value) or f"{type(value).__module__}.{type(value).__qualname__} is not JSON serializable"
    )


def _null(_name: str) -> None:
    """What JavaScript and pydantic write for NaN and the infinities."""


_encode = json.JSONEncoder(default=_jsonable).encode


async def _send(
    response: Response, request: HttpRequest, open_channel: OpenChannel, on_complete: OnComplete | None
) -> HttpResponse | None:
    if type(response).__call__ is not Response.__call__:  # streams, files, the user's own kinds
        return await run_asgi(response, request, open_channel, on_complete=on_complete)
    sent = HttpResponse(response.status_code, list(response.raw_headers), bytes(response.body))
    if response.background is not None:
        if on_complete is not None:
            on_complete(sent)
        try:
            await enter(response.background)
        except Exception:  # the response is made, so it is no failure of the call
            logger.exception("Exception in a background task of request %s %s", request.method, request.request_id)
    return sent
