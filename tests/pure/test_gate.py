"""The gate's inspection of heads: the quick look at usual ones says what the close look says."""

import random

import pytest

from qserve_gateway.door import gate
from qserve_gateway.door.gate import CHUNKED, MOST_HEADERS, Refusal, inspect_closely, inspect_head

LINES = [
    b"GET / HTTP/1.1",
    b"POST /a/b?c=d HTTP/1.1",
    b"GET /a/../b HTTP/1.1",
    b"GET /..x HTTP/1.1",
    b"GET /%2e%2e HTTP/1.1",
    b"GET /a#b HTTP/1.1",
    b"GET http://h/a HTTP/1.1",
    b"GET / HTTP/1.0",
    b"get / HTTP/1.1",
    b"GET  / HTTP/1.1",
]
FIELDS = [
    b"Host: h",
    b"host:h:80",
    b"HOST: \t[::1]:8000 ",
    b"Host: h/",
    b"Host: h, i",
    b"Host:",
    b"Hosts: h",
    b"Host : h",
    b"Content-Length: 5",
    b"content-length:0",
    b"Content-Length: +5",
    b"Content-Length: 5, 5",
    b"Content-Lengths: x",
    b"Transfer-Encoding: chunked",
    b"transfer-encoding: gzip, chunked",
    b"TE: trailers",
    b"Upgrade: websocket",
    b"Upgrade: h2c",
    b"Connection: Upgrade",
    b"qserve-model: x",
    b"Qserve-: y",
    b"Accept: */*",
    b"X: \x80\xff",
    b"X: a\tb",
    b"X: a\x00b",
    b"X: a\nb",
    b" folded",
    b"\xffX: a",
    b": a",
    b"X",
]


def seen(look: object, head: bytes) -> object:
    """What a function makes of a head: its result, or the refusal."""
    assert callable(look)
    try:
        return look(head)
    except Refusal as refusal:
        return refusal.status, refusal.reason, refusal.kind


@pytest.mark.parametrize("seed", range(20))
def test_a_quick_look_finds_what_a_close_look_finds(seed: int) -> None:
    drawn = random.Random(seed)
    quick = 0
    for _ in range(500):
        chosen = drawn.sample(FIELDS, drawn.randrange(5))
        if drawn.random() < 0.7:
            chosen.insert(drawn.randrange(len(chosen) + 1), b"Host: example.com")
        first = drawn.choice(LINES[:3] if drawn.random() < 0.7 else LINES)
        head = b"".join(line + b"\r\n" for line in (first, *chosen)) + b"\r\n"
        found = seen(inspect_head, head)
        assert found == seen(inspect_closely, head), head
        quick += found == (head, 0, False)
    assert quick > 20  # so the quick look was asked, too


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ((b"Host: h",), 0),
        ((b"Host: h", b"Content-Length: 12"), 12),
        ((b"content-length: 12", b"Accept: x", b"HOST: h"), 12),
        ((b"Host: h", b"Transfer-Encoding: chunked"), CHUNKED),
    ],
)
def test_the_length_of_a_body(fields: tuple[bytes, ...], length: int) -> None:
    head = b"POST / HTTP/1.1\r\n" + b"".join(field + b"\r\n" for field in fields) + b"\r\n"
    assert inspect_head(head) == (head, length, False)


@pytest.mark.parametrize(
    "fields",
    [
        (b"Content-Length: 1", b"Host: h", b"Content-Length: 1"),
        (b"Host: h", b"Content-Length: 1", b"Content-Length: 2"),
        (b"Host: h", b"Content-Length: 1", b"Transfer-Encoding: chunked"),
        (b"Host: h", b"Accept: x", b"host: h"),
        (b"Host: h", *[b"a:"] * MOST_HEADERS),
    ],
)
def test_what_can_be_read_in_two_ways_or_is_too_much_is_refused(fields: tuple[bytes, ...]) -> None:
    with pytest.raises(Refusal):
        inspect_head(b"POST / HTTP/1.1\r\n" + b"".join(field + b"\r\n" for field in fields) + b"\r\n")


@pytest.mark.parametrize("fields", [b"Host: h", b"Accept: x\r\nhost: h\r\nX: y", b"Content-Length: 3\r\nHost: h:80"])
def test_usual_heads_need_no_close_look(fields: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "inspect_closely", lambda _: pytest.fail("it was looked at closely"))
    inspect_head(b"GET /a?b=c HTTP/1.1\r\n%b\r\n\r\n" % fields)


@pytest.mark.parametrize(
    ("target", "cookie", "is_taken"), [(10, 30_000, True), (10, 33_000, False), (8_000, 10, True), (9_000, 10, False)]
)
def test_how_large_heads_may_be(target: int, cookie: int, is_taken: bool) -> None:
    head = b"GET /%b HTTP/1.1\r\nHost: h\r\nCookie: %b\r\n\r\n" % (b"t" * target, b"c" * cookie)
    assert (seen(inspect_head, head) == (head, 0, False)) is is_taken


def test_the_most_headers_are_taken() -> None:
    head = b"GET / HTTP/1.1\r\nHost: h\r\n" + b"a:\r\n" * (MOST_HEADERS - 1) + b"\r\n"
    assert inspect_head(head) == (head, 0, False)
