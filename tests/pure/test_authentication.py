"""Codes and tags of messages: of this one, with an accepted key, and about the same thing."""

import hmac

import pytest

from qserve.errors import FrameRejected
from qserve.wire.authentication import CODE_BYTES, SmallCodes
from qserve.wire.messages import TAG_BYTES, Signer

NEW, OLD = b"n" * 32, b"o" * 32
LARGE = memoryview(bytes(range(256)) * 40)
SIZES = [0, 1, 63, 8192, 8193, 100_000]


@pytest.mark.parametrize("secret", [b"", b"short", b"x" * 64, b"x" * 65])
@pytest.mark.parametrize("size", [0, 1, 64, 1000])
def test_codes_of_small_messages_are_hmac_sha256(secret: bytes, size: int) -> None:
    assert SmallCodes(secret)(bytes(size)) == hmac.digest(secret, bytes(size), "sha256")


@pytest.mark.parametrize("size", SIZES)
def test_a_frame_of_any_size_is_opened_by_whoever_accepts_its_key(size: int) -> None:
    body = bytes(size)
    frame = Signer((OLD,)).seal(body)
    assert frame[:1] == (b"\x01" if size <= 8192 else b"\x02")
    assert Signer((OLD,)).open(frame) == Signer((NEW, OLD)).open(frame) == body
    assert Signer((OLD, NEW)).is_own(frame)
    assert not Signer((NEW, OLD)).is_own(frame)
    for stranger in (Signer((NEW,)), Signer()):
        with pytest.raises(FrameRejected):
            stranger.open(frame)
    with pytest.raises(FrameRejected):
        Signer((OLD,)).open(Signer().seal(body))


@pytest.mark.parametrize("size", [100, 10_000])
@pytest.mark.parametrize("at", [*range(TAG_BYTES), TAG_BYTES, 99])
def test_a_frame_in_which_a_bit_was_changed_is_rejected(size: int, at: int) -> None:
    frame = bytearray(Signer((NEW,)).seal(bytes(size)))
    frame[at] ^= 1
    with pytest.raises(FrameRejected):
        Signer((NEW,)).open(bytes(frame))


def test_a_code_of_one_kind_does_not_pass_for_the_other() -> None:
    for size in (100, 10_000):
        frame = Signer((NEW,)).seal(bytes(size))
        with pytest.raises(FrameRejected):
            Signer((NEW,)).open((b"\x02" if frame[:1] == b"\x01" else b"\x01") + frame[1:])


@pytest.mark.parametrize("size", range(TAG_BYTES + 1))
def test_a_frame_that_was_cut_is_rejected(size: int) -> None:
    for kind in (100, 10_000):
        with pytest.raises(FrameRejected):
            Signer((NEW,)).open(Signer((NEW,)).seal(bytes(kind))[:size])


def test_the_tag_of_a_large_message_is_another_one_each_time_and_holds() -> None:
    first, second = (Signer((NEW,)).tag(LARGE, b"t 3") for _ in range(2))
    assert len(first) == len(second) == TAG_BYTES == 5 + CODE_BYTES
    assert first != second  # two messages under one key and nonce would give it away
    assert Signer((NEW,)).holds(first, LARGE, b"t 3")
    assert Signer((OLD, NEW)).holds(second, LARGE, b"t 3")


@pytest.mark.parametrize(
    ("reader", "body", "about"),
    [
        (Signer((NEW,)), LARGE, b"t 4"),
        (Signer((NEW,)), LARGE[:-1], b"t 3"),
        (Signer((NEW,)), memoryview(bytes(len(LARGE))), b"t 3"),
        (Signer((OLD,)), LARGE, b"t 3"),
        (Signer(), LARGE, b"t 3"),
    ],
    ids=["about", "cut", "content", "key", "unsigned"],
)
def test_a_tag_holds_for_nothing_else(reader: Signer, body: memoryview, about: bytes) -> None:
    assert not reader.holds(Signer((NEW,)).tag(LARGE, b"t 3"), body, about)


@pytest.mark.parametrize("at", range(TAG_BYTES))
def test_a_tag_in_which_a_bit_was_changed_does_not_hold(at: int) -> None:
    tag = bytearray(Signer((NEW,)).tag(LARGE, b"t"))
    tag[at] ^= 1
    assert not Signer((NEW,)).holds(bytes(tag), LARGE, b"t")


def test_without_keys_nothing_is_signed_and_a_reader_with_keys_takes_nothing_unsigned() -> None:
    tag = Signer().tag(LARGE, b"t")
    assert tag == bytes(TAG_BYTES)
    assert Signer().holds(tag, LARGE, b"t")
    assert not Signer((NEW,)).holds(tag, LARGE, b"t")
