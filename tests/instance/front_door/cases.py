"""Bad input, as a table: a request with one thing wrong with it per line."""

from collections.abc import Iterator

from qserve.testing import TestInstance
from tests.support.chosen_server import client_of

GOOD_HEAD = b"GET /a HTTP/1.1\r\nHost: x\r\n"


def get(*lines: bytes, target: bytes = b"/a", host: bytes = b"Host: x\r\n", rest: bytes = b"") -> bytes:
    """A GET with these header lines."""
    return b"GET " + target + b" HTTP/1.1\r\n" + host + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + rest


def post(*lines: bytes, rest: bytes = b"") -> bytes:
    """A POST with these header lines, then `rest`."""
    return b"POST /a HTTP/1.1\r\nHost: x\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + rest


def chunked(body: bytes) -> bytes:
    """A POST with a chunked body."""
    return post(b"Transfer-Encoding: chunked", rest=body)


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"

FRAMING = {
    "length and chunked": post(b"Content-Length: 5", b"Transfer-Encoding: chunked", rest=b"0\r\n\r\n" + SMUGGLED),
    "chunked and length": post(b"Transfer-Encoding: chunked", b"Content-Length: 5", rest=b"0\r\n\r\n" + SMUGGLED),
    "same length twice": post(b"Content-Length: 2", b"Content-Length: 2", rest=b"ab"),
    "two lengths": post(b"Content-Length: 2", b"Content-Length: 40", rest=b"ab" + SMUGGLED),
    "chunked twice": post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", rest=b"0\r\n\r\n"),
    "chunked with HTTP/1.0": b"POST /a HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "websocket with a body": get(
        *(b"Connection: upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"),
        *(b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", b"Content-Length: 3"),
        rest=b"abc",
    ),
    **{
        f"length {value!r}": post(b"Content-Length:" + value, rest=b"ab")
        for value in (
            *(b"", b" ", b" +2", b" -2", b" 2,2", b" 2, 2", b" 0x2", b" 2 2", b" two", b" 2.0", b" 1e1", b" \xb2"),
            *(b" 9999999999999999999", b" 18446744073709551618", b" _2", b" 2_0", b" 2;", b" 2\t2"),
        )
    },
    **{
        f"encoding {value!r}": post(b"Transfer-Encoding:" + value, rest=b"0\r\n\r\n")
        for value in (
            *(b"", b" identity", b" gzip", b" gzip, chunked", b" identity, chunked", b" chunked, identity", b" chunke"),
            *(b" chunked, chunked", b" xchunked", b" chunkedx", b" chunked;q=1"),
            *(b' "chunked"', b" chunked,", b" ,chunked"),
            *(b" chunked\xa0", b" \xe2\x80\x8bchunked", b" ch unked"),
        )
    },
}

LINES = {
    "bare LF": b"GET /a HTTP/1.1\nHost: x\n\n",
    "bare LF after a header": b"GET /a HTTP/1.1\r\nHost: x\nA: b\r\n\r\n",
    "bare LF at the end": b"GET /a HTTP/1.1\r\nHost: x\r\n\n",
    "bare CR": b"GET /a HTTP/1.1\rHost: x\r\r",
    "bare CR in a value": get(b"A: b\rc: d"),
    "LF in a value": get(b"A: b\nTransfer-Encoding: chunked"),
    "folded with a space": get(b"A: b", b" c"),
    "folded with a tab": get(b"A: b", b"\tc"),
    "folded first": b"GET /a HTTP/1.1\r\n Host: x\r\n\r\n",
    "no colon": get(b"abc"),
    "no name": get(b": abc"),
    "two empty lines first": b"\r\n\r\n" + get(),
    "nothing": b"\r\n\r\n",
    **{
        f"name {name!r}": get(name + b": v")
        for name in (
            *(b"A ", b"A\t", b" A", b"A B", b"A\x00", b"A\x0b", b"A\xe4"),
            *(b"A(", b"A,", b"A;", b"A=", b"A@", b"A[", b"A{"),
            *(b'"A"', b"A/", b"A<", b"A\\", b"A?", b"A\x7f", b"Transfer-Encoding ", b"Content-Length ", b"Host "),
        )
    },
    **{f"value with {code:#04x}": get(b"A: b%cc" % code) for code in [*range(9), 11, 12, *range(14, 32), 127]},
}

HOSTS = {
    "no Host": get(host=b""),
    "two Hosts": get(b"Host: y"),
    "the same Host twice": get(b"Host: x"),
    "Host in two spellings": get(b"HOST: x"),
    **{
        f"Host {value!r}": get(host=b"Host:" + value + b"\r\n")
        for value in (
            *(b"", b" ", b" a b", b" a,b", b" a/b", b" a?b", b" a#b"),
            *(b" a@b", b" user:pw@b", b" http://a", b" a:b", b" a:"),
            *(b" a:123456", b" a:-1", b" a:80:80", b" [::1", b" ::1", b" [x]"),
            *(b" [::1]x", b" a\\b", b" a%00", b" <a>", b" \xe4"),
            *(b" a;b", b" a'b", b' "a"', b" (a)", b" a&b", b" {a}", b" a=b", b" a|b", b" a^b", b" a`b", b" $a", b" a!"),
        )
    },
}

TARGETS = {
    **{
        f"target {target!r}": get(target=target)
        for target in (
            *(b"@evil.com", b"evil.com", b"a", b"?a", b"#a", b"*", b"\\a"),
            *(b":80", b"evil.com:443", b"mailto:a", b"ftp://x/a"),
            *(b"http:///a", b"http://y/a", b"http://x@y/a", b"http://x:81/a"),
            *(b"http:/x/a", b"http:a", b"//\x00", b"file:///a"),
            *(b"/a#b", b"/\xe4", b"/\x7f", b"/a\tb", b"/a b", b"/%00"),
            *(b"/a%00b", b"/%0d%0aa", b"/%0A", b"/%1f", b"/%7f"),
            *(b"/..", b"/../a", b"/a/..", b"/a/../../etc/passwd", b"/%2e%2e/a"),
            *(b"/a/%2E%2e", b"/%2f..%2f%00", b"/a%2f..%2fb"),
            *(b"/.%2e/a", b"/a/..;/b", b"/a\\..\\b", b"/a%5c..%5cb", b"/..?a", b"/%2e%2e%2f%2e%2e%2fetc"),
        )
    },
    "URL of 9 KB": get(target=b"/" + b"a" * 9_000),
    "URL of 100 KB": get(target=b"/" + b"a" * 100_000),
    "query of 9 KB": get(target=b"/?" + b"a" * 9_000),
}

FIRST_LINES = {
    f"first line {line!r}": line + b"\r\nHost: x\r\n\r\n"
    for line in (
        *(b"get /a HTTP/1.1", b"Get /a HTTP/1.1", b"GET /a", b"GET", b"GET  /a HTTP/1.1", b" GET /a HTTP/1.1", b"/a"),
        *(b"GET /a  HTTP/1.1", b"GET /a HTTP/1.1 ", b"GET\t/a\tHTTP/1.1", b"GET /a HTTP/1.2", b"GET /a HTTP/2.0"),
        *(b"GET /a HTTP/0.9", b"GET /a HTTP/1.10", b"GET /a HTTP/1"),
        *(b"GET /a http/1.1", b"GET /a HTTPS/1.1", b"GET /a FTP/1.1"),
        *(b"PRI * HTTP/2.0", b"BOGUS /a HTTP/1.1", b"G\xcbT /a HTTP/1.1"),
        *(b"GE,T /a HTTP/1.1", b"CONNECT x:443 HTTP/1.1"),
        *(b"GET /a HTTP/1.1 x", b"GET HTTP/1.1 /a", b"HTTP/1.1 200 OK"),
        *(b"\x16\x03\x01\x02\x00\x01", b"EHLO x", b"GET/a HTTP/1.1"),
        *(b"G E T /a HTTP/1.1", b"GET /a HTTP/+1.1", b"GET /a HTTP/1.\x31\x00"),
        *(b"PING", b"*1 PING", b"GET /a RTSP/1.0"),
    )
}

SIZES = {
    "101 headers": get(*(b"A%d: b" % number for number in range(100))),
    "10,000 headers": get(*(b"A%d: b" % number for number in range(10_000))),
    "header of 33 KB": get(b"A: " + b"b" * 33_000),
    "header of 100 KB": get(b"A: " + b"b" * 100_000),
    "header of 8 MB": get(b"A: " + b"b" * 8_000_000),
    "name of 40 KB": get(b"a" * 40_000 + b": b"),
    "first line of 1 MB without an end": b"GET /" + b"a" * 1_000_000,
}

CHUNKS = {
    f"chunks {body[:24]!r}": chunked(body)
    for body in (
        *(b"x\r\nab\r\n0\r\n\r\n", b"-2\r\nab\r\n0\r\n\r\n", b"+2\r\nab\r\n0\r\n\r\n"),
        *(b"0x2\r\nab\r\n0\r\n\r\n", b"\r\nab\r\n0\r\n\r\n"),
        *(b" 2\r\nab\r\n0\r\n\r\n", b"2\nab\n0\n\n", b"2\nab\r\n0\r\n\r\n"),
        *(b"2\r\nab\n0\r\n\r\n", b"2\r\nabc\r\n0\r\n\r\n"),
        *(b"2\r\nab0\r\n\r\n", b"3\r\nab\r\n0\r\n\r\n", b"10000000000000000\r\nab"),
        *(b"ffffffffffffffff1\r\nab", b"2;a\nb\r\nab\r\n0\r\n\r\n"),
        *(b"2;\x00\r\nab\r\n0\r\n\r\n", b"2;" + b"a" * 300 + b"\r\nab\r\n0\r\n\r\n"),
        *(b"2 a\r\nab\r\n0\r\n\r\n", b"2,2\r\nab\r\n0\r\n\r\n"),
        *(b"0000000000002\r\nab\r\n0\r\n\r\n", b"2\rab\r\n0\r\n\r\n", b"0\r\nA\r\n\r\n"),
        *(b"0\r\nA: b\n\r\n", b"0\r\n A: b\r\n\r\n"),
        *(b"0\r\nA : b\r\n\r\n", b"0\r\n" + b"A: b\r\n" * 2_000 + b"\r\n"),
        *(b"0\n\r\n", b"2_0\r\nab", b"\xb2\r\nab\r\n0\r\n\r\n"),
        *(b"2\r\r\nab\r\n0\r\n\r\n", b"2\x0b\r\nab\r\n0\r\n\r\n", b"\x002\r\nab\r\n0\r\n\r\n"),
    )
}

CONNECTION = {
    f"Connection names {name.decode()}": get(b"Connection: close, " + name)
    for name in (
        *(b"host", b"Authorization", b"cookie", b"forwarded", b"x-real-ip"),
        *(b"X-Forwarded-For", b"x-forwarded-proto", b"content-length"),
    )
}


def refused() -> Iterator[tuple[str, bytes]]:
    """(name, what is sent); every one is answered with 400 and the connection is closed."""
    for table in (FRAMING, LINES, HOSTS, TARGETS, FIRST_LINES, SIZES, CHUNKS, CONNECTION):
        yield from table.items()


ACCEPTED = {
    "plain": get(),
    "HTTP/1.0 without Host": b"GET /a HTTP/1.0\r\n\r\n",
    "100 headers": get(*(b"A%d: b" % number for number in range(98))),
    "URL of 8,000 bytes": get(target=b"/" + b"a" * 8_000),
    "headers of 30 KB": get(b"A: " + b"b" * 30_000),
    "empty line first": b"\r\n" + get(),
    "absolute": get(target=b"http://x/a"),
    "absolute without a path": get(target=b"http://X?a=1"),
    "encoded": get(target=b"/%e4%bd%a0%20b/%2e/c?d=%00%0d%0a&e=.."),
    "odd characters": get(target=b"/a|b\"{}^`<>[]~'!$&()*+,;=:@"),
    "two slashes": get(target=b"//a//b"),
    "dots": get(target=b"/a..b/...c/..d/e.."),
    "empty value": get(b"A:"),
    "value of high bytes": get(b"A: \xe4\xff"),
    "value with a tab": get(b"A: b\tc"),
    "host with a port": get(host=b"Host: a.example:8000\r\n"),
    "host of IPv6": get(host=b"Host: [::1]:8000\r\n"),
    "host with an underscore": get(host=b"host:\tgate_way\t\r\n"),
    "body": post(b"Content-Length: 2", rest=b"ab"),
    "body of nothing": post(b"Content-Length: 0"),
    "body of a GET": get(b"Content-Length: 2", rest=b"ab"),
    "chunks": chunked(b"2\r\nab\r\n0A\r\n0123456789\r\n0\r\n\r\n"),
    "chunks with extensions": chunked(b'2;a=b;c="d"\r\nab\r\n0;x\r\n\r\n'),
    "trailers": chunked(b"2\r\nab\r\n0\r\nAuthorization: me\r\nB: c\r\n\r\n"),
    "chunked in capitals": post(b"TRANSFER-ENCODING: Chunked", rest=b"0\r\n\r\n"),
    "upgrade to HTTP/2": post(b"Connection: Upgrade, A", b"Upgrade: h2c", b"Content-Length: 2", rest=b"ab"),
}


def handshake(*lines: bytes, target: bytes = b"/a") -> bytes:
    """A request for a WebSocket."""
    return get(
        *(b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"),
        *(b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", *lines),
        target=target,
        host=b"Host: us.example:8000\r\n",
    )


def calls_of(instance: TestInstance, deployment: str) -> int:
    """How many calls a deployment has, waiting and running."""
    with client_of(instance.settings.redis_url) as client:
        return int(client.xlen(instance.settings.keys.calls(deployment)))
