"""How many connections a gateway lets in, from all addresses and from one, and which pages may open WebSockets."""

from collections.abc import Callable
from functools import partial

import pytest

from qserve.settings import Settings
from qserve_gateway.door.gate import Refusal
from qserve_gateway.door.limits import Door, Look, same_host


def looker() -> Look:
    return lambda now: None


def refused(enter: Callable[[], None]) -> int:
    """The status of the refusal; 0 for none."""
    try:
        enter()
    except Refusal as refusal:
        return refusal.status
    return 0


def test_there_are_exactly_as_many_connections_as_allowed_at_any_time() -> None:
    door = Door(Settings(http_max_connections=3), has_log=False)
    looks = [looker() for _ in range(5)]
    assert [refused(partial(door.enter, look, "a")) for look in looks] == [0, 0, 0, 503, 503]
    for look in (looks[0], *looks[3:]):
        door.leave(look, "a")
    assert door.connections == 2
    assert [refused(lambda: door.enter(looker(), "a")) for _ in range(2)] == [0, 503]


def test_each_address_has_exactly_as_many_as_allowed_at_any_time() -> None:
    door = Door(Settings(http_max_connections_per_ip=2), has_log=False)
    looks = [looker() for _ in range(3)]
    assert [refused(partial(door.enter, look, "a")) for look in looks] == [0, 0, 429]
    assert refused(lambda: door.enter(looker(), "b")) == 0
    for look in looks[1:]:
        door.leave(look, "a")
    assert [refused(lambda: door.enter(looker(), "a")) for _ in range(2)] == [0, 429]


def test_a_websocket_keeps_the_place_of_its_connection_until_it_ends() -> None:
    door = Door(Settings(http_max_connections_per_ip=1), has_log=False)
    before, after = looker(), looker()
    door.enter(before, "a")
    door.become_websocket(before, after)
    assert (door.connections, door.websockets) == (1, 1)
    late = looker()
    assert refused(lambda: door.enter(late, "a")) == 429
    door.leave(late, "a")
    door.leave_websocket(after, "a")
    assert (door.connections, door.websockets) == (0, 0)
    assert refused(lambda: door.enter(looker(), "a")) == 0


def test_no_address_is_remembered_when_its_last_connection_has_gone() -> None:
    door = Door(Settings(http_max_connections_per_ip=1), has_log=False)
    for number in range(100):
        look = looker()
        door.enter(look, str(number))
        door.leave(look, str(number))
    assert not door._by_ip


def test_without_a_limit_one_address_may_have_all() -> None:
    door = Door(Settings(), has_log=False)
    assert {refused(lambda: door.enter(looker(), "a")) for _ in range(1000)} == {0}


def head(origin: str, host: str = "shop.example") -> bytes:
    return f"GET / HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("origins", "origin", "status"),
    [
        ("", "https://shop.example", 0),
        ("", "http://SHOP.example:80", 0),
        ("", "https://shop.example:444", 403),
        ("", "https://evil.example", 403),
        ("", "https://shop.example.evil.example", 403),
        ("", "null", 403),
        ("", "http://[::1", 403),
        ("https://friend.example/", "https://friend.example", 0),
        ("https://friend.example", "http://friend.example", 403),
        ("https://friend.example", "https://evil.example", 403),
        ("*", "https://evil.example", 0),
    ],
)
def test_pages_of_our_own_host_and_of_listed_origins_may_open_websockets(
    origins: str, origin: str, status: int
) -> None:
    door = Door(Settings(websocket_origins=origins), has_log=False)
    assert refused(lambda: door.check_origin(head(origin))) == status


@pytest.mark.parametrize("origin", ["null", "", "file://", "http://"])
def test_what_names_no_host_is_nobodys(origin: str) -> None:
    assert not same_host(origin, "")
    assert not same_host(origin, "shop.example")
