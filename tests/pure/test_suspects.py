"""Calls whose replica died: when they run again, and that no call is given up because of its company."""

import random

from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import integers, randoms, sets

from qserve.broker.replica_queue import Entry
from qserve_workers.calls.suspects import Suspects

MOST = 3


def suspect(name: str, deliveries: int = 2) -> Entry:
    return Entry(name.encode(), b"", deliveries)


def waiting(*entries: Entry) -> Suspects:
    suspects = Suspects(MOST)
    for entry in entries:
        suspects.add(entry)
    return suspects


def test_as_many_begin_as_there_is_room_for_whatever_else_runs() -> None:
    suspects = waiting(*(suspect(name) for name in "abc"))
    assert [entry.id for entry in suspects.choose(2, is_idle=False)] == [b"a", b"b"]
    assert suspects.entries == [b"c"]
    assert suspects.choose(0, is_idle=False) == []


def test_a_last_chance_waits_until_nothing_else_runs_and_then_is_alone() -> None:
    suspects = waiting(suspect("last", MOST), suspect("other"))
    assert suspects.want_to_be_alone
    assert [entry.id for entry in suspects.choose(5, is_idle=True)] == [b"other"]
    assert suspects.choose(5, is_idle=True) == []  # the other one is starting
    suspects.starting.clear()
    assert suspects.choose(5, is_idle=False) == []
    assert [entry.id for entry in suspects.choose(5, is_idle=True)] == [b"last"]
    assert suspects.alone == b"last"
    assert suspects.want_to_be_alone
    suspects.end_trial(b"last")
    assert not suspects.want_to_be_alone


def test_one_that_could_not_begin_is_the_next() -> None:
    suspects = waiting(suspect("a"), suspect("b"))
    (first,) = suspects.choose(1, is_idle=True)
    suspects.starting.discard(first.id)
    suspects.put_back(first)
    assert suspects.entries == [b"a", b"b"]
    suspects.forget({b"a"})
    assert suspects.entries == [b"b"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls=integers(1, 12), poisonous=sets(integers(0, 11), max_size=3), room=integers(1, 12), order=randoms())
def test_only_calls_that_kill_are_given_up(calls: int, poisonous: set[int], room: int, order: random.Random) -> None:
    """All have run in a replica that died. Each successor gets what is left, and dies if a call in it kills."""
    starts, given_up = dict.fromkeys(range(calls), 1), set()
    while starts:
        names = list(starts)
        order.shuffle(names)
        suspects = waiting(*(suspect(str(call), starts[call] + 1) for call in names))
        is_alive = True
        while is_alive and len(suspects):
            running = [int(entry.id) for entry in suspects.choose(room, is_idle=True)]
            is_alive = poisonous.isdisjoint(running)
            for call in running:
                starts[call] += 1
                if is_alive:
                    del starts[call]  # it has ended well
                elif starts[call] == MOST:
                    given_up.add(call)
                    del starts[call]
            suspects.starting.clear()
            suspects.end_trial(suspects.alone)
    assert given_up == poisonous & set(range(calls))
