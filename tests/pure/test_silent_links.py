"""When a pair of connections counts as silent."""

from typing import Any, cast

from qserve.broker.link import CHECK_EVERY_S, REST_S, Link


class Line:
    """A connection that owes an answer, or none."""

    is_open = True
    is_retiring = False

    def __init__(self) -> None:
        self.heard, self.is_idle = 1, True

    def send(self, *_command: object) -> None:
        self.is_idle = False

    def answer(self) -> None:
        self.heard, self.is_idle = self.heard + 1, True

    def give_up(self) -> None:
        self.is_open = False

    close = give_up


class Pair:
    """A link of two such connections, of which the second waits for something all the time."""

    def __init__(self, *, rests: bool) -> None:
        async def nothing() -> None: ...

        self.link = Link("redis://localhost", nothing)
        self.sender, self.waiter = Line(), Line()
        self.link.sender, self.link.waiter = cast("Any", self.sender), cast("Any", self.waiter)
        self.link.rests = rests
        self.waiter.is_idle = False
        self.link.check()

    def until_lost(self) -> float:
        """Check until it is given up; how long that takes, if all of it happens when it should."""
        seconds = 0.0
        while self.sender.is_open:
            seconds += REST_S if self.link.pause_s > 1.2 * CHECK_EVERY_S else CHECK_EVERY_S
            self.link.check()
        return seconds


def test_a_pair_that_owes_answers_and_gives_none_is_given_up_after_three_checks_or_two_rests(monkeypatch: Any) -> None:
    monkeypatch.setattr("qserve.broker.link.until_next", lambda interval_s: interval_s)
    assert Pair(rests=False).until_lost() == 3 * CHECK_EVERY_S
    assert Pair(rests=True).until_lost() == 2 * REST_S


def test_while_it_rests_a_blocking_read_may_end_after_the_check(monkeypatch: Any) -> None:
    monkeypatch.setattr("qserve.broker.link.until_next", lambda interval_s: interval_s)
    pair = Pair(rests=True)
    for _ in range(5):
        pair.sender.answer()
        assert pair.link.pause_s == REST_S
        pair.link.check()
        pair.waiter.heard += 1
        pair.sender.answer()
        pair.link.check()
        assert pair.link.pause_s == REST_S
    assert pair.sender.is_open


def test_one_that_is_silent_only_where_it_waits_is_given_up_too(monkeypatch: Any) -> None:
    monkeypatch.setattr("qserve.broker.link.until_next", lambda interval_s: interval_s)
    pair, seconds = Pair(rests=True), 0.0
    while pair.sender.is_open:
        pair.sender.answer()
        seconds += pair.link.pause_s
        pair.link.check()
    assert seconds == 2 * REST_S + CHECK_EVERY_S
