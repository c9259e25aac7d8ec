"""Values that msgpack has no form for, as extension types: those that hold no other values.

Every kind has a number that never changes its meaning. `LEAVES` tells how a type becomes wire data, `READERS` how an
extension becomes the value again; whatever a reader raises, the codec takes for a malformed message.
"""

import struct
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
from msgspec.msgpack import Ext

from qserve.errors import ValueNotSerializable
from qserve.wire.messages import HttpRequest, decode_http_request
from qserve.wire.messages import encode as encode_message

if TYPE_CHECKING:
    from starlette.requests import Request

TUPLE, SET, FROZENSET, PAIRS, ENUM, DATACLASS, MODEL, HANDLE = range(1, 9)
"""Kinds with values inside; the codec takes them apart."""
PICKLED = 9
TEXT, BIG_INT, COMPLEX, BYTEARRAY, DATETIME, DATE, TIME, TIMEDELTA, UUID_, DECIMAL = range(16, 26)
REQUEST = 34
"""The others of these are in `qserve.wire.arrays`: 32, 33 and 35 to 38."""
LARGE_PICKLED = 39
PASSED = 40

_encode = msgspec.msgpack.Encoder().encode
_COMPLEX = struct.Struct("<dd")
_SMALLEST, _LARGEST = -(2**63), 2**64 - 1
_MICROSECOND = timedelta(microseconds=1)
Moment = tuple[str, int, str, int | None]
"""ISO text without zone, fold, zone name or "", offset from UTC in microseconds."""
_decode_moment = msgspec.msgpack.Decoder(Moment).decode
_decode_timedelta = msgspec.msgpack.Decoder(tuple[int, int, int]).decode


def int_to_wire(value: int) -> object:
    """An int as it is, or an extension where msgpack's 64 bits are too few."""
    if _SMALLEST <= value <= _LARGEST:
        return value
    return Ext(BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def str_to_wire(value: str) -> object:
    """A str as it is, or an extension where it holds lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return Ext(TEXT, value.encode("utf-8", "surrogatepass"))
    return value


def _moment(value: datetime | time) -> bytes:
    offset = value.utcoffset()
    zone = value.tzinfo.key if isinstance(value.tzinfo, ZoneInfo) else ""
    naive = value.replace(tzinfo=None, fold=0).isoformat()
    moment: Moment = (naive, value.fold, zone or "", None if offset is None else offset // _MICROSECOND)
    return _encode(moment)


def _zone(name: str, offset: int | None) -> tzinfo | None:
    if name:
        try:
            return ZoneInfo(name)
        except (ValueError, OSError, LookupError):
            pass  # a zone this machine does not know: the offset keeps the moment right
    return None if offset is None else timezone(offset * _MICROSECOND)


def _read_datetime(data: memoryview) -> datetime:
    text, fold, name, offset = _decode_moment(data)
    return datetime.fromisoformat(text).replace(fold=fold, tzinfo=_zone(name, offset))


def _read_time(data: memoryview) -> time:
    text, fold, name, offset = _decode_moment(data)
    return time.fromisoformat(text).replace(fold=fold, tzinfo=_zone(name, offset))


def _read_timedelta(data: memoryview) -> timedelta:
    days, seconds, microseconds = _decode_timedelta(data)
    return timedelta(days, seconds, microseconds)


LEAVES: dict[type, Callable[[Any], object]] = {
    int: int_to_wire,
    str: str_to_wire,
    complex: lambda value: Ext(COMPLEX, _COMPLEX.pack(value.real, value.imag)),
    datetime: lambda value: Ext(DATETIME, _moment(value)),
    date: lambda value: Ext(DATE, value.isoformat().encode()),
    time: lambda value: Ext(TIME, _moment(value)),
    timedelta: lambda value: Ext(TIMEDELTA, _encode((value.days, value.seconds, value.microseconds))),
    UUID: lambda value: Ext(UUID_, value.bytes),
    Decimal: lambda value: Ext(DECIMAL, str(value).encode()),
}


# --- Starlette requests -----------------------------------------------------------------------------------------------


def request_to_wire(request: "Request") -> object:
    """An extension with the part of the scope that makes sense elsewhere, and the body.

    Raises:
        ValueNotSerializable: The body has not been read yet; packing cannot wait for it.
    """
    body = getattr(request, "_body", None)
    if body is None:
        raise ValueNotSerializable(
            "the body of this request has not been read yet: `await request.body()` first, then send the request"
        )
    scope = request.scope
    message = HttpRequest(
        method=scope["method"],
        path=scope["path"],
        raw_path=scope.get("raw_path") or b"",
        query_string=scope.get("query_string", b""),
        headers=[(bytes(name), bytes(value)) for name, value in scope["headers"]],
        root_path=scope.get("root_path", ""),
        scheme=scope.get("scheme", "http"),
        client=scope.get("client"),
        server=scope.get("server"),
        http_version=scope.get("http_version", "1.1"),
        request_id="",
        body=body,
    )
    return Ext(REQUEST, encode_message(message))


def make_request(message: HttpRequest) -> "Request":
    """A Starlette request whose body is there already; it never disconnects."""
    from starlette.requests import Request  # noqa: PLC0415  a client that sends none need not load it

    scope = {name: getattr(message, name) for name in message.__struct_fields__ if name not in {"body", "request_id"}}
    request = Request(scope | {"type": "http", "asgi": {"version": "3.0"}}, _Body(message.body).receive)
    request._body = message.body
    return request


class _Body:
    """ASGI receive of a body that is there already."""

    def __init__(self, body: bytes) -> None:
        self._messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive(self) -> dict[str, object]:
        if not self._messages:
            import anyio  # noqa: PLC0415  comes with Starlette

            await anyio.sleep_forever()
        return self._messages.pop()


READERS: dict[int, Callable[[memoryview], object]] = {
    TEXT: lambda data: bytes(data).decode("utf-8", "surrogatepass"),
    BIG_INT: lambda data: int.from_bytes(data, "little", signed=True),
    COMPLEX: lambda data: complex(*_COMPLEX.unpack(data)),
    BYTEARRAY: bytearray,
    DATETIME: _read_datetime,
    DATE: lambda data: date.fromisoformat(bytes(data).decode()),
    TIME: _read_time,
    TIMEDELTA: _read_timedelta,
    UUID_: lambda data: UUID(bytes=bytes(data)),
    DECIMAL: lambda data: Decimal(bytes(data).decode()),
    REQUEST: lambda data: make_request(decode_http_request(data)),
}
