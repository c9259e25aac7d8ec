"""What a request must look like before any parser or deployment sees it.

Whoever stands in front of the gateway (a proxy, a cache) may read an ambiguous request in another way than our parser,
and so may the application behind it. Nothing here is repaired: a request that allows two readings is refused.

| refused with 400 | because |
|---|---|
| Content-Length and Transfer-Encoding; two Content-Length; one that is not digits | where does the body end? |
| Transfer-Encoding other than exactly `chunked`, twice, or with HTTP/1.0 | the same |
| chunk sizes that are not 1 to 12 hex digits, bad extensions, data not followed by CRLF | the same |
| a body with a WebSocket's handshake | the same |
| bare LF or CR, folded headers, a space before the colon, control characters | where does a header end? |
| no Host (HTTP/1.1), two, or one that is more than a name and a port | it becomes part of URLs |
| a target that does not begin with "/", or names another host than Host; fragments; CONNECT | what is asked for? |
| control characters, %00 to %1f, %7f and `..` segments in the path, also encoded | for what is behind us |
| a method that is not upper case, another version than 1.0 or 1.1 | |
| more than 100 headers, 32 KiB of them, 8 KiB of URL, 8 KiB of trailers | |

`http://host/path` is accepted where it names the same host, and becomes `/path`. Trailers, `qserve-*` headers and
offers to upgrade to anything but a WebSocket are taken out.
"""

import re
from typing import NoReturn
from urllib.parse import unquote_to_bytes

LARGEST_HEAD = 32 * 1024
LARGEST_TARGET = 8 * 1024
LARGEST_TRAILER = 8 * 1024
MOST_HEADERS = 100
CHUNKED = -1
"""Stands for the length of a body in chunks."""

_LARGEST_CHUNK_LINE = 256
_NAME = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_VALUE = rb"[^\x00-\x08\x0a-\x1f\x7f]*+"
_FIELDS = rb"(?:" + _NAME + rb":" + _VALUE + rb"\r\n)*+\r\n"
_HOST = rb"(?:[0-9A-Za-z_.-]++|\[[0-9A-Fa-f:.]++\])(?::[0-9]{1,5})?"

# Possessive quantifiers: one pass over the head, whatever stands in it.
_OTHERS = (
    rb"(?:(?!(?i:host:|content-length:|transfer-encoding:|upgrade:|qserve-))" + _NAME + rb":" + _VALUE + rb"\r\n)*+"
)
_ITS_HOST = rb"(?i:host):[ \t]*+" + _HOST + rb"[ \t]*+\r\n" + _OTHERS
_ITS_LENGTH = rb"(?:(?i:content-length):[ \t]*+([0-9]{1,18})[ \t]*+\r\n" + _OTHERS + rb")?+"
_match_usual = re.compile(
    rb"[A-Z-]++ (/[!\"$&-~]*+) HTTP/1\.1\r\n" + _OTHERS + _ITS_LENGTH + _ITS_HOST + rb"(?(2)|" + _ITS_LENGTH + rb")\r\n"
).fullmatch
"""Matches heads that need no closer look: no percent sign or fragment in the path, one Host, at most one length."""
_match_request_line = re.compile(rb"([A-Z-]++) ([!\"$-~]++) HTTP/1\.([01])\r\n").match
_match_fields = re.compile(_FIELDS).fullmatch
_find_host = re.compile(rb"\r\nhost:[ \t]*+(" + _HOST + rb")[ \t]*+\r\n").search
_find_length = re.compile(rb"\r\ncontent-length:[ \t]*+([0-9]{1,18})[ \t]*+\r\n").search
_find_chunked = re.compile(rb"\r\ntransfer-encoding:[ \t]*+chunked[ \t]*+\r\n").search
_find_websocket = re.compile(rb"\r\nupgrade:[ \t]*+websocket[ \t]*+\r\n").search
_find_absolute = re.compile(rb"https?://(" + _HOST + rb")(/.*|\?.*|)", re.IGNORECASE | re.DOTALL).fullmatch
_find_upward = re.compile(rb"(?:^|[/\\])\.\.(?:$|[/\\;])").search
_find_control = re.compile(rb"[\x00-\x1f\x7f]").search
_find_broken_line = re.compile(rb"[^\r]\n|\r(?!\n|\Z)|\x00", re.DOTALL).search
_drop_fields = re.compile(rb"(?<=\r\n)(?:upgrade|qserve-[^:\r]*+):[^\r]*+\r\n", re.IGNORECASE).sub
_drop_own_fields = re.compile(rb"(?<=\r\n)qserve-[^:\r]*+:[^\r]*+\r\n", re.IGNORECASE).sub
_match_chunk_line = re.compile(rb"([0-9A-Fa-f]{1,12})[ \t]*+(?:;[\t -~]{0,200}+)?\r\n").match


class Refusal(Exception):
    """A request that is answered at the door.

    Attributes:
        status: The status of the answer.
        reason: What the answer says.
        kind: What the metrics call it.
    """

    def __init__(self, status: int, reason: str, kind: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.kind = kind


def inspect_head(head: bytes) -> tuple[bytes, int, bool]:
    """Check the head of a request, from its first byte to its empty line.

    Returns:
        The head for the parser, the length of the body (or CHUNKED), and whether it asks for a WebSocket.

    Raises:
        Refusal: It allows more than one reading.
    """
    usual = _match_usual(head)
    if usual is not None and len(head) <= LARGEST_TARGET and head.count(b"\r\n") <= MOST_HEADERS + 2:
        target, length_before_host, length_behind = usual.groups()
        if b".." not in target:
            return head, int(length_before_host or length_behind or 0), False
    return inspect_closely(head)


def inspect_closely(head: bytes) -> tuple[bytes, int, bool]:
    """The same as `inspect_head`, for any head, with a reason where it is refused; three times slower."""
    head = _inspect_line(head)
    if len(head) > LARGEST_TARGET:
        _inspect_sizes(head)
    if head.count(b"\r\n") > MOST_HEADERS + 2:
        refuse(f"more than {MOST_HEADERS} headers", "size")
    low = head.lower()
    if low.count(b"\r\nhost:") != 1 or _find_host(low) is None:
        _inspect_host(head, low)
    length = 0
    if b"\r\ncontent-length:" in low or b"\r\ntransfer-encoding:" in low:
        length = _body_length(head, low)
    websocket = False
    if b"\r\nupgrade:" in low or b"\r\nqserve-" in low:
        head, websocket = _inspect_upgrade(head, low, length)
    return head, length, websocket


def inspect_part_of_head(part: bytes | bytearray) -> None:
    """Check as much of a head as has arrived; `part` may begin anywhere in it.

    Raises:
        Refusal: Whatever follows, the head will be refused.
    """
    if _find_broken_line(part) is not None:
        refuse("a line end that is not CRLF, or a NUL", "syntax")


def refuse(reason: str, kind: str) -> NoReturn:
    """Raise a refusal with status 400."""
    raise Refusal(400, reason, kind)


def header_in(head: bytes, name: bytes) -> bytes:
    """Find the last value of a header in a head that was checked; b"" where there is none.

    Args:
        name: In lower case.
    """
    begin = head.lower().rfind(b"\r\n" + name + b":")
    return head[begin + len(name) + 3 : head.index(b"\r\n", begin + 2)].strip() if begin >= 0 else b""


def _inspect_line(head: bytes) -> bytes:
    if head.startswith(b"\r\n"):
        # Some clients send an empty line after a body; RFC 9112 wants it ignored.
        head = head[2:]
    line = _match_request_line(head)
    if line is None:
        _inspect_sizes(head)
        refuse("its first line is not METHOD /path HTTP/1.1", "syntax")
    if _match_fields(head, line.end()) is None:
        refuse("a header is not `Name: value`", "syntax")
    method, target, minor = line.groups()
    if target == b"*" and method == b"OPTIONS":
        raise Refusal(204, "what is served here depends on the path", "options")
    if not target.startswith(b"/"):
        absolute = _find_absolute(target)
        if absolute is None:
            refuse("its target does not begin with '/'", "target")
        host = _find_host(head.lower())
        if host is None or host[1] != absolute[1].lower():
            refuse("its target and its Host header name different hosts", "host")
        target = absolute[2] if absolute[2].startswith(b"/") else b"/" + absolute[2]
        head = b"%b %b HTTP/1.%b%b" % (method, target, minor, head[line.end() - 2 :])
    _inspect_path(target)
    return head


def _inspect_path(target: bytes) -> None:
    path = target.partition(b"?")[0]
    if b"#" in target:
        refuse("its target has a fragment", "target")
    decoded = unquote_to_bytes(path)
    if _find_control(decoded) is not None:
        refuse("its path contains control characters", "target")
    if _find_upward(decoded) is not None:
        refuse("its path contains '..'", "target")


def _inspect_sizes(head: bytes) -> None:
    if len(head) > LARGEST_HEAD:
        refuse(f"its headers are over {LARGEST_HEAD} bytes", "size")
    if head.find(b"\r\n") > LARGEST_TARGET:
        refuse(f"its URL is over {LARGEST_TARGET} bytes", "size")


def _inspect_host(head: bytes, low: bytes) -> None:
    count = low.count(b"\r\nhost:")
    if count > 1:
        refuse("several Host headers", "host")
    if count == 1:
        refuse("its Host header is not a name and a port", "host")
    if not _is_1_0(head):
        refuse("no Host header", "host")


def _body_length(head: bytes, low: bytes) -> int:
    lengths, encodings = low.count(b"\r\ncontent-length:"), low.count(b"\r\ntransfer-encoding:")
    if lengths and encodings:
        refuse("both Content-Length and Transfer-Encoding", "framing")
    if lengths > 1:
        refuse("several Content-Length headers", "framing")
    if lengths:
        length = _find_length(low)
        if length is None:
            refuse("its Content-Length is not a number", "framing")
        return int(length[1])
    if encodings > 1 or _find_chunked(low) is None:
        refuse("a Transfer-Encoding other than chunked", "framing")
    if _is_1_0(head):
        refuse("Transfer-Encoding with HTTP/1.0", "framing")
    return CHUNKED


def _inspect_upgrade(head: bytes, low: bytes, length: int) -> tuple[bytes, bool]:
    if b"\r\nupgrade:" in low and low.count(b"\r\nupgrade:") == 1 and _find_websocket(low) is not None:
        if length:
            refuse("a WebSocket's handshake with a body", "framing")
        return _drop_own_fields(b"", head), True
    # The parser would stop at another upgrade and lose the body; we never do one.
    return _drop_fields(b"", head), False


def _is_1_0(head: bytes) -> bool:
    return head.startswith(b" HTTP/1.0\r\n", head.index(b"\r\n") - 9)


class LengthBody:
    """Follows a body of known length to its end.

    Attributes:
        done: It has ended.
    """

    def __init__(self, length: int) -> None:
        self.left = length
        self.done = False

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        """(what the parser may have, what belongs to the next request)."""
        size = len(data)
        if size < self.left:
            self.left -= size
            return data, b""
        part, rest = data[: self.left], data[self.left :]
        self.left, self.done = 0, True
        return part, rest


class ChunkedBody:
    """Follows a chunked body to its end; trailers are dropped.

    Attributes:
        done: It has ended.
    """

    def __init__(self) -> None:
        self.done = False
        self._left = 0
        """Of the current chunk and its CRLF."""
        self._line = b""
        """The beginning of a line, which the parser gets when it is whole."""
        self._trailer = False

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        """(what the parser may have, what belongs to the next request).

        Raises:
            Refusal: It is not framed as it should be.
        """
        if self._line:
            data, self._line = self._line + data, b""
        position, size = 0, len(data)
        while position < size:
            if self._trailer:
                return data[:position], self._take_trailer(data[position:])
            if self._left:
                step = min(self._left, size - position)
                self._left -= step
                position += step
                continue
            line = _match_chunk_line(data, position)
            if line is None:
                self._hold(data[position:])
                break
            length = int(line[1], 16)
            if length:
                position = line.end()
                self._left = length + 2
            else:
                # Ours is fed instead, with the end of the trailer.
                self._trailer = True
                return data[:position], self._take_trailer(data[line.end() :])
        return data[:position], b""

    def _take_trailer(self, data: bytes) -> bytes:
        if data.startswith(b"\r\n"):
            self.done = True
            return data[2:]
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(data) > LARGEST_TRAILER:
                refuse("its trailers are too long", "size")
            inspect_part_of_head(data)
            self._line = data
            return b""
        if end > LARGEST_TRAILER or _match_fields(data[:end]) is None:
            refuse("a trailer is not `Name: value`", "syntax")
        self.done = True
        return data[end:]

    def _hold(self, line: bytes) -> None:
        if len(line) > _LARGEST_CHUNK_LINE or b"\n" in line or not _could_be_chunk_line(line):
            refuse("a chunk without its size", "framing")
        self._line = line


LAST_CHUNK = b"0\r\n\r\n"
_could_be_chunk_line = re.compile(rb"[0-9A-Fa-f]{1,12}[ \t]*+(?:;[\t -~]*+)?\r?").fullmatch
