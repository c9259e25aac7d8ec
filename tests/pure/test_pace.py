"""When whoever finds a queue full is told to come back."""

import time
from typing import Any

import pytest

from qserve.broker.retry_after import Pace


class Watched:
    """A queue's counters, and a clock, that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.added = self.length = self.looks = 0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def send(self, on_answer: Any, *command: object) -> None:
        assert command == ("XINFO", "STREAM", "calls")
        self.looks += 1
        on_answer([b"length", self.length, b"entries-added", self.added])

    def pass_by(self, seconds: float, answered: int) -> None:
        self.now += seconds
        self.added += answered


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def waits(queue: Pace, depth: int) -> list[float]:
    return [queue.wait_s(depth) for _ in range(300)]


def test_before_anything_is_known_it_is_one_to_three_seconds() -> None:
    assert all(1 <= wait <= 3 for wait in waits(Pace("calls"), 10_000))


def test_then_it_is_as_long_as_the_queue_takes(watched: Watched) -> None:
    queue = Pace("calls")
    queue.look(watched)  # type: ignore[arg-type]
    watched.pass_by(2, answered=100)
    queue.look(watched)  # type: ignore[arg-type]

    found = waits(queue, 500)

    assert all(7.5 <= wait <= 12.5 for wait in found)
    assert max(found) - min(found) > 3


def test_a_quick_queue_is_worth_a_second_and_a_standing_one_half_a_minute(watched: Watched) -> None:
    queue = Pace("calls")
    queue.look(watched)  # type: ignore[arg-type]
    watched.pass_by(1, answered=10_000)
    queue.look(watched)  # type: ignore[arg-type]
    assert all(1 <= wait <= 1.25 for wait in waits(queue, 100))

    watched.pass_by(1, answered=0)
    queue.look(watched)  # type: ignore[arg-type]
    found = waits(queue, 100)
    assert all(18 <= wait <= 30 for wait in found)
    assert max(found) - min(found) > 6  # a crowd does not come back at once


def test_calls_that_come_are_not_taken_for_calls_that_leave(watched: Watched) -> None:
    queue = Pace("calls")
    queue.look(watched)  # type: ignore[arg-type]
    watched.pass_by(1, answered=10_000)
    watched.length = 9_999
    queue.look(watched)  # type: ignore[arg-type]

    assert all(18 <= wait <= 30 for wait in waits(queue, 9_999))


def test_a_thousand_refusals_look_once(watched: Watched) -> None:
    queue = Pace("calls")
    for _ in range(1000):
        queue.look(watched)  # type: ignore[arg-type]
    assert watched.looks == 1


def test_what_was_seen_long_ago_does_not_count(watched: Watched) -> None:
    queue = Pace("calls")
    queue.look(watched)  # type: ignore[arg-type]
    watched.pass_by(1, answered=0)
    queue.look(watched)  # type: ignore[arg-type]
    watched.pass_by(600, answered=0)
    queue.look(watched)  # type: ignore[arg-type]

    assert all(1 <= wait <= 3 for wait in waits(queue, 100))
