"""Call and Reply as inert data, and the signed frames they travel in.

A frame is `b"\\0" + body` without keys, or `kind (1 byte) + key id (4) + authentication code (32) + body`. The code is
HMAC-SHA256 where the kind is `b"\\1"`, and that of large messages where it is `b"\\2"`. The body is the msgpack of the
message. A frame is verified before it is decoded. Everything that decides what happens to a call is inside the body and
so under the signature.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeVar

import msgspec

from qserve.errors import FrameRejected, QServeError
from qserve.wire.authentication import CODE_BYTES, LargeCodes, SmallCodes, key_id
from qserve.wire.parts import Parts, Payload, Source

PYTHON, HTTP, STREAM, WEBSOCKET = 0, 1, 2, 3
"""What a call is: packed (args, kwargs) for a value; an HttpRequest; packed (args, kwargs) for a stream of values; an
HttpRequest that opens a WebSocket."""
VALUE, HTTP_RESPONSE, ERROR, CONTROL, CHUNK = 0, 1, 2, 3, 4
"""What a reply's payload is: packed value, an HttpResponse, an ErrorInfo, a Control message, or a channel's Chunk."""
SAFE = "s"
"""Flag of an entry whose call may be run again after its replica died."""
DURABLE = "d"
"""Flag of an entry whose call has a record, which gets its answer."""


WITHIN = "qserve-within"
"""In the meta of a call that was made by a call: the lineage of that one."""
REQUEST = "qserve-request"
"""In the meta of a call that was made by a call: the id of the request behind it, where no call has that id."""
MODEL = "qserve-model"
"""In the meta of a call that is for one of the models of a multiplexed deployment: the model's id."""
NO_META: Mapping[str, str] = MappingProxyType({})


class Call(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One call, as it stands in a deployment's queue.

    Attributes:
        id: Unique for ever: the caller's 128-bit incarnation and a counter.
        deployment: Name of the deployment it was put to.
        reply_to: Process id of the caller, whose inbox gets the reply.
        ttl_ms: Time left when it was enqueued, in ms; the entry id says when that was on Redis' clock.
        kind: PYTHON, HTTP, STREAM or WEBSOCKET.
        method: Method name, "" for `__call__`.
        safe: May run again after its replica died.
        payload: Encoded arguments or request; empty if `out_of_line`.
        out_of_line: The payload stands under a key of its own, see `qserve.broker.payloads`.
    """

    id: str
    deployment: str
    reply_to: str
    ttl_ms: int
    kind: int
    method: str
    safe: bool
    payload: bytes
    out_of_line: bool = False

    @property
    def meta(self) -> Mapping[str, str]:
        """Empty."""
        return NO_META


class CallWithMeta(Call, frozen=True, array_like=True, gc=False):
    """A call with what the hooks of its caller say. Every call is decoded as one."""

    meta: dict[str, str] = {}


class Reply(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One message to a process: the outcome of a call, or a control message.

    Attributes:
        id: The call's id; for CONTROL the id the message is about, or "".
        to: Process id of the receiver; a frame found in another inbox is rejected.
        kind: VALUE, HTTP_RESPONSE, ERROR, CONTROL or CHUNK.
        payload: Encoded by kind; empty if `out_of_line`.
        out_of_line: The payload stands under a key of its own, see `qserve.broker.payloads`.
    """

    id: str
    to: str
    kind: int
    payload: bytes
    out_of_line: bool = False


class Blob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A payload that travels out of line, bound by the signature to what it is of.

    Attributes:
        id: The call's id for arguments or a request, `result_id` of it for a result.
    """

    id: str
    data: bytes


class Lent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a large payload of an ordinary call is: in the memory of the process that sends it.

    Attributes:
        owner: Process id of the sender, whose inbox can be asked to send it.
        host: The machine, and the process ids that hold there.
        pid, fd, inode: The memory file, as the sender has it open.
        cookie: With what it begins.
        generation: Which of the contents that it has had.
        sizes: Bytes of the parts: the packed value, and the buffers it refers to.
        passed: Where values of other processes are that it refers to, because the sender hands them on.
    """

    owner: str
    host: str
    pid: int
    fd: int
    inode: int
    cookie: bytes
    generation: int
    sizes: tuple[int, ...]
    passed: tuple["Lent", ...] = ()


class LargeReply(NamedTuple):
    """A reply whose large payload has arrived; else like `Reply`."""

    id: str
    kind: int
    payload: Source


Outcome = Reply | LargeReply | QServeError
"""What becomes of a call: the reply of a replica, or the reason why there is none."""


class WebSocketEvent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One ASGI websocket message, either way.

    Attributes:
        type: "connect", "receive", "disconnect", "accept", "send", "close", or a denial response's part.
        code, reason: Of a disconnect or close; `code` is the status of a denial.
    """

    type: str
    text: str | None = None
    data: bytes | None = None
    code: int = 1000
    reason: str = ""
    subprotocol: str | None = None
    headers: list[tuple[bytes, bytes]] = []


class Control(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A message to a process that is no reply.

    Attributes:
        verb: `cancel` a call; `sweep` after a neighbour's death; `leave`, and let another replica take the place; note
            where the threads stand (`stacks`); `send` what was lent; `adopt` a call, for its model;
            `take_back` one that was handed over; or `move` calls to the queue that are due.
        entry: The call to cancel, adopt or take back; or which content of which segment to send, and under which name.
        inherited: Cancel it even if it is not safe: it is part of a call that is.
    """

    verb: Literal["cancel", "sweep", "leave", "stacks", "send", "adopt", "take_back", "move"]
    entry: str = ""
    inherited: bool = False


class ErrorInfo(msgspec.Struct, frozen=True, array_like=True):
    """An exception as data.

    Attributes:
        code: Class name of a qserve error, or "" for user code's own.
        type_name, module: The original class.
        message: `str()` of the original.
        traceback_text: The remote traceback; empty in a cause and in members, whose text the outermost one has.
        args: Packed arguments and attributes, as far as they can travel.
        cause: The exception that it was raised from.
        members: What a group of exceptions consists of.
    """

    code: str
    type_name: str
    module: str
    message: str
    traceback_text: str = ""
    args: bytes = b""
    cause: "ErrorInfo | None" = None
    members: "tuple[ErrorInfo, ...]" = ()


class HttpRequest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An ASGI scope and its body; `path` is the full decoded path, `root_path` the prefix before the app.

    Attributes:
        body: The whole body, or its beginning if `body_follows` on the call's channel.
        subprotocols: What a WebSocket's client offers.
    """

    method: str
    path: str
    raw_path: bytes
    query_string: bytes
    headers: list[tuple[bytes, bytes]]
    root_path: str
    scheme: str
    client: tuple[str, int] | None
    server: tuple[str, int | None] | None
    http_version: str
    request_id: str
    body: bytes
    body_follows: bool = False
    subprotocols: tuple[str, ...] = ()


class HttpResponse(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A whole response: status, raw headers in order, body."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


HttpMessage = TypeVar("HttpMessage", HttpRequest, HttpResponse)

_CODE_AT = 5
_BODY_AT = TAG_BYTES = _CODE_AT + CODE_BYTES
_LARGE = 8 * 1024


class Signer:
    """Seals and opens frames. Thread-safe.

    Args:
        secrets: Accepted signing keys, the first one signs; none: frames are not signed.
    """

    def __init__(self, secrets: tuple[bytes, ...] = ()) -> None:
        self._small = {b"\x01" + key_id(secret): SmallCodes(secret) for secret in secrets}
        self._large = {b"\x02" + key_id(secret): LargeCodes(secret) for secret in secrets}
        self._head, self._large_head = next(zip(self._small, self._large, strict=True), (b"\x00", b"\x00"))
        self._sign, self._sign_large = self._small.get(self._head), self._large.get(self._large_head)

    @property
    def signs(self) -> bool:
        """Whether frames are signed, which is what allows pickled values."""
        return self._sign is not None

    def seal(self, body: bytes) -> bytes:
        """The frame of a body."""
        if self._sign is None or self._sign_large is None:
            return b"\x00" + body
        if len(body) > _LARGE:
            return b"%b%b%b" % (self._large_head, self._sign_large(body), body)
        return b"%b%b%b" % (self._head, self._sign(body), body)

    def tag(self, body: memoryview, about: bytes) -> bytes:
        """What proves that a large body comes from one of us, and what it is about; `TAG_BYTES`, zeros without keys."""
        return bytes(TAG_BYTES) if self._sign_large is None else self._large_head + self._sign_large(body, about)

    def holds(self, tag: bytes, body: memoryview, about: bytes) -> bool:
        """Whether `tag` was made with an accepted key for this body, and with the same `about`."""
        if self._sign_large is None:
            return tag == bytes(TAG_BYTES)
        codes = self._large.get(tag[:_CODE_AT])
        return codes is not None and codes.hold(tag[_CODE_AT:], body, about)

    def is_own(self, frame: bytes) -> bool:
        """Whether a frame that `open` accepts is signed with the key that `seal` uses, not with another one."""
        return frame.startswith((self._head, self._large_head))

    def open(self, frame: bytes) -> bytes:
        """The body of a frame.

        Raises:
            FrameRejected: Not signed with an accepted key, or not a frame. Where keys are set, unsigned frames are
                rejected; where none are, signed ones are.
        """
        if self._sign is None:
            if frame[:1] != b"\x00":
                raise FrameRejected("a signed frame, but this process has no key: set QSERVE_SECRET")
            return frame[1:]
        head = frame[:_CODE_AT]
        codes = self._small.get(head) or self._large.get(head)
        if codes is None:
            raise FrameRejected("a frame that no accepted key signed")
        body = frame[_BODY_AT:]
        if not codes.hold(frame[_CODE_AT:_BODY_AT], body):
            raise FrameRejected("a frame with a bad signature")
        return body


Message = TypeVar("Message")
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not what they should be."""


def decoder_of(kind: type[Message]) -> Callable[[bytes | memoryview], Message]:
    """Make a decoder for one kind of message. It raises FrameRejected for anything else."""
    decode = msgspec.msgpack.Decoder(kind).decode

    def read(body: bytes | memoryview) -> Message:
        try:
            return decode(body)
        except UNREADABLE as exc:
            raise FrameRejected(f"not a {kind.__name__} ({exc})") from exc

    return read


encode = msgspec.msgpack.Encoder().encode


def with_meta(call: Call, meta: Mapping[str, str]) -> CallWithMeta:
    """The call, with what the hooks of its caller say."""
    fields = {name: getattr(call, name) for name in Call.__struct_fields__}
    return CallWithMeta(**fields, meta=dict(meta))


def lineage_of(call: Call) -> str:
    """The ids of the calls that a call is a part of, and its own, with spaces between them."""
    within = call.meta.get(WITHIN) if call.meta else None
    return call.id if within is None else f"{within} {call.id}"


def request_of(call: Call) -> str:
    """The id of the request that a call is a part of: a client's, or that of the first call."""
    asked = call.meta.get(REQUEST) if call.meta else None
    return lineage_of(call).partition(" ")[0] if asked is None else asked


def encode_bare(message: msgspec.Struct) -> bytes:
    """Encode a message that may have been decoded before, so that an empty meta takes no byte, as in a new message."""
    if "meta" in message.__struct_fields__ and not getattr(message, "meta", None):
        bare: type[msgspec.Struct] = type(message).__mro__[1]
        message = bare(**{name: getattr(message, name) for name in bare.__struct_fields__})
    return encode(message)


def pack_http(message: HttpRequest | HttpResponse, largest_frame: int) -> Payload:
    """The encoded message; a body of more than `largest_frame` bytes stands beside it."""
    if len(message.body) <= largest_frame:
        return encode(message)
    return Parts(encode(msgspec.structs.replace(message, body=b"")), message.body)


def unpack_http(decode: Callable[[bytes], HttpMessage], payload: bytes | Source) -> HttpMessage:
    """The message that `pack_http` has packed; raises like `decode`."""
    if isinstance(payload, bytes):
        return decode(payload)
    head = payload.head
    message = decode(head)
    if len(payload) > len(head):
        message = msgspec.structs.replace(message, body=payload.take_bytes(1))
    payload.finish()
    return message


decode_call = decoder_of(CallWithMeta)
decode_reply = decoder_of(Reply)
decode_control = decoder_of(Control)
decode_blob = decoder_of(Blob)
decode_lent = decoder_of(Lent)
decode_websocket_event = decoder_of(WebSocketEvent)
decode_error = decoder_of(ErrorInfo)
decode_http_request = decoder_of(HttpRequest)
decode_http_response = decoder_of(HttpResponse)
