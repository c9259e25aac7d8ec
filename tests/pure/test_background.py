"""What a process does again and again."""

import os
import random
import time

import pytest

from qserve.background import CHANCE, until_next
from qserve.broker.retry_after import Pace
from qserve.wire.call_record import Terms


@pytest.mark.parametrize("interval_s", [0.05, 1.0, 30.0])
def test_all_that_is_done_so_often_is_done_at_the_same_moments(
    interval_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = set()
    for part in range(1, 100):
        now = 1000.0 + interval_s * part / 100
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        pause = until_next(interval_s)
        assert 0.1 * interval_s <= pause <= 1.1 * interval_s
        moments.add(round(((now + pause) / interval_s) % 1, 3))
    assert len(moments) == 1


def test_processes_have_moments_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    pauses = []
    for pid in range(400, 420):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        pauses.append(until_next(1.0))
    gaps = [later - before for before, later in zip(sorted(pauses), sorted(pauses)[1:], strict=False)]
    assert max(gaps) < 0.1


def test_pauses_do_not_depend_on_numbers_that_a_program_seeds_and_take_none_of_them() -> None:
    def pauses() -> list[float]:
        random.seed(1)
        before = random.getstate()
        found = [Pace("calls").wait_s(5), Terms(backoff_s=60).pause_ms(3), CHANCE.random()]
        assert random.getstate() == before
        return found

    assert set(pauses()).isdisjoint(pauses())
