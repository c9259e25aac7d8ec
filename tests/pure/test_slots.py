"""How many calls a replica runs at once, and that each gives its place back exactly once."""

import asyncio
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from qserve.broker.keys import Keys
from qserve.broker.replica_queue import Entry
from qserve.wire.messages import PYTHON, Call
from qserve_workers.calls.call_counts import CallCounts
from qserve_workers.calls.running import RunningCall
from qserve_workers.calls.slots import Slots

ASYNC: Any = SimpleNamespace(only_sync=False)
SYNC: Any = SimpleNamespace(only_sync=True)
NOBODY: Any = None


class Places:
    """The slots of a replica, and which of them came back."""

    def __init__(self, calls: int, threads: int = 1) -> None:
        self.freed: list[RunningCall] = []
        spec: Any = SimpleNamespace(max_concurrent_queries=calls, max_threads=threads, idempotent=False)
        counts = CallCounts(Keys("test"), "Echo", 5.0)
        self.slots = Slots(spec, NOBODY, asyncio.Event(), self.freed.append, counts)
        self._numbers = count(1)

    def take(self, times: int = 1, *, on_thread: bool = False, safe: bool = True) -> RunningCall:
        for _ in range(times):
            name = str(next(self._numbers))
            call = Call(name, "Echo", "caller", 1000, PYTHON, "", safe, b"")
            running = RunningCall(Entry(name.encode(), b"", 1), call, on_thread)
            self.slots.take(running)
        return running


def test_a_replica_has_exactly_as_many_places_as_it_may_run_calls() -> None:
    places = Places(3)
    seen = [places.slots.free(ASYNC)]
    for _ in range(3):
        last = places.take()
        seen.append(places.slots.free(ASYNC))
    assert seen == [3, 2, 1, 0]
    places.slots.give_back(last, ran=True)
    assert (places.slots.free(ASYNC), places.slots.handled) == (1, 1)


@pytest.mark.parametrize(("calls", "threads", "free"), [(100, 1, 1), (100, 4, 4), (2, 4, 2)])
def test_one_that_has_threads_only_has_no_more_places_than_threads(calls: int, threads: int, free: int) -> None:
    places = Places(calls, threads)
    assert (places.slots.free(SYNC), places.slots.room(SYNC)) == (free, free)
    places.take(free, on_thread=True)
    assert (places.slots.free(SYNC), places.slots.room(SYNC)) == (0, 0)


def test_while_a_call_waits_for_the_thread_the_next_one_is_left_to_others() -> None:
    places = Places(100)
    places.take(on_thread=True)
    assert places.slots.free(ASYNC) == 99
    waiting = places.take(on_thread=True)
    assert places.slots.free(ASYNC) == 0
    places.slots.give_back(waiting)
    assert places.slots.free(ASYNC) == 99


def test_a_burst_is_asked_for_in_steps_that_double_and_never_beyond_what_is_free() -> None:
    places = Places(6)
    assert places.slots.room(ASYNC) == 1
    places.take()
    assert places.slots.room(ASYNC) == 2
    places.take(2)
    assert places.slots.room(ASYNC) == 3
    places.take(2)
    assert places.slots.room(ASYNC) == 1
    assert Places(6).slots.room(ASYNC, begun=3) == 4


def test_a_place_comes_back_once() -> None:
    places = Places(2)
    running = places.take()
    assert [places.slots.give_back(running) for _ in range(2)] == [True, False]
    assert places.freed == [running]
    assert places.slots.free(ASYNC) == 2


@pytest.mark.parametrize("on_thread", [False, True])
def test_code_that_goes_on_after_its_answer_keeps_its_place_until_it_ends(on_thread: bool) -> None:
    places = Places(2)
    running = places.take(on_thread=on_thread)
    places.slots.give_back(running, ran=True, goes_on=True)
    assert (places.slots.free(ASYNC), places.slots.harm_nobody, places.slots.entries) == (1, False, [])
    for _ in range(2):
        places.slots.end_background(running)
    assert (places.slots.free(ASYNC), places.slots.harm_nobody) == (2, True)
    assert places.freed == [running, running]


def test_it_may_die_without_harm_only_where_all_that_runs_may_run_again() -> None:
    places = Places(3)
    places.take(2)
    assert places.slots.harm_nobody
    unsafe = places.take(safe=False)
    assert not places.slots.harm_nobody
    assert [places.slots.may_run_again(each.call) for each in places.slots.calls] == [True, True, False]
    places.slots.give_back(unsafe)
    assert places.slots.harm_nobody
