"""Ambiguous, malformed and oversized requests: each is refused at once, and nothing else happens."""

import asyncio
import json
import random
import time

import pytest

from tests.instance.front_door.cases import ACCEPTED, CONNECTION, SMUGGLED, chunked, get, post, refused
from tests.support.raw_http import Address, read_response, statuses
from tests.support.slowness import patience

pytestmark = pytest.mark.usefixtures("unharmed")

LIMIT_S = 2.0
CASES = dict(refused())
INSERTED = [b"\r\n", b"\n", b"\r", b"\x00", b":", b" ", b"0\r\n\r\n", b"%00", b"\xff"]


def test_there_are_more_than_200_cases_and_no_two_are_the_same() -> None:
    assert len(CASES) >= 200
    assert len(set(CASES.values())) == len(CASES)


def test_every_case_is_answered_with_400_a_reason_and_an_id_within_two_seconds(door: Address) -> None:
    async def ask_all() -> dict[str, bytes]:
        gate = asyncio.Semaphore(16)

        async def ask(data: bytes) -> bytes:
            async with gate:
                return await door.ask_async(data, patience(LIMIT_S))

        return dict(zip(CASES, await asyncio.gather(*map(ask, CASES.values())), strict=True))

    wrong = {}
    for name, answer in asyncio.run(ask_all()).items():
        head, _, body = answer.partition(b"\r\n\r\n")
        closed = b"connection: close" in head or name in CONNECTION
        told = b"request" in body.lower() and b"x-request-id: " in head and b"Traceback" not in body
        if statuses(answer) != [400] or not closed or not told:
            wrong[name] = answer[:300]
    assert wrong == {}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_only_unusual_is_served(door: Address, name: str) -> None:
    with door.connect() as connection:
        connection.sendall(ACCEPTED[name])
        status, _, body = read_response(connection)
    assert status == 200, body
    told = json.loads(body)
    assert told["path"].startswith("/")
    assert "authorization" not in dict(told["headers"])
    assert b"ab" not in ACCEPTED[name][-8:] or told["body"] >= 2


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("step", [1, 7, 64])
def test_it_is_served_too_when_it_comes_in_pieces(door: Address, name: str, step: int) -> None:
    data = ACCEPTED[name]
    if len(data) > 1_000:
        step *= 1_000
    with door.connect() as connection:
        for begin in range(0, len(data), step):
            connection.sendall(data[begin : begin + step])
            if begin % (step * 8) == 0:
                time.sleep(0.0005)
        assert read_response(connection)[0] == 200


def test_requests_one_behind_the_other_are_answered_in_order(door: Address) -> None:
    lines = [get(target=b"/1"), post(b"Content-Length: 3", rest=b"abc"), chunked(b"1\r\na\r\n0\r\nT: u\r\n\r\n")]
    answer = door.ask(b"".join([*lines, get(b"Connection: close", target=b"/4")]))
    assert statuses(answer) == [200] * 4
    assert [path in answer for path in (b'"/1"', b'"/4"')] == [True, True]


def test_a_bad_request_behind_good_ones_is_answered_in_its_turn(door: Address) -> None:
    answer = door.ask(get(target=b"/1") + get(target=b"/2") + get(host=b"") + SMUGGLED)
    assert statuses(answer) == [200, 200, 400]


def test_a_bad_chunk_behind_a_good_request_is_answered_in_its_turn(door: Address) -> None:
    answer = door.ask(get(target=b"/1") + chunked(b"zz\r\n\r\n") + SMUGGLED)
    assert statuses(answer) == [200, 400]


def test_the_smuggled_request_is_never_served(door: Address) -> None:
    for name in ("length and chunked", "chunked and length", "two lengths"):
        assert b"smuggled" not in door.ask(CASES[name])


def test_options_of_the_server_are_answered(door: Address) -> None:
    assert statuses(door.ask(b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")) == [204]


def test_headers_that_look_like_ours_or_like_a_proxys_do_not_arrive(door: Address) -> None:
    lines = (b"Qserve-Internal: 1", b"X_Forwarded_For: 1.2.3.4", b"X-Other: a", b"My_Header: b", b"TE: trailers")
    with door.connect() as connection:
        connection.sendall(get(*lines, b"Connection: X-Other, keep-alive"))
        _, _, body = read_response(connection)
    names = [name for name, _ in json.loads(body)["headers"]]
    assert names == ["host", "my_header"]


@pytest.mark.timeout(120)
def test_two_thousand_mutations_are_all_answered_within_two_seconds(door: Address) -> None:
    """Any answer will do, as long as there is one and it is not the gateway that failed."""
    rng = random.Random(20)
    seeds = [*ACCEPTED.values(), *(case for case in CASES.values() if len(case) < 2_000)]
    inputs = [mutated(rng, seeds) for _ in range(2_000)]

    async def ask_all() -> list[tuple[bytes, bytes]]:
        gate = asyncio.Semaphore(50)

        async def ask(data: bytes) -> tuple[bytes, bytes]:
            async with gate:
                # without a half-closed connection: a request cut short has to be given up by the gateway
                return data, await door.ask_async(data, patience(6))

        return await asyncio.gather(*map(ask, inputs))

    allowed = {200, 204, 400, 408, 413, 426}
    answers = asyncio.run(ask_all())
    assert [(data[:200], answer[:200]) for data, answer in answers if not set(statuses(answer)) <= allowed] == []


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A request with some bytes changed, lost, doubled, or swapped with another request's."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            data[position : position + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[position : position + rng.randint(1, 8)]
        elif kind == 2:
            data[position:position] = data[position : position + rng.randint(1, 16)]
        elif kind == 3:
            other = rng.choice(seeds)
            data[position:] = other[rng.randrange(len(other)) :]
        elif kind == 4:
            data[position:position] = rng.choice(INSERTED)
        else:
            del data[position:]
        data = data or bytearray(b"G")
    return bytes(data)
