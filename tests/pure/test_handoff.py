"""Work that other threads hand to the thread of an event loop."""

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from qserve.calls.handoff import Handoff
from tests.support.slowness import patience


def in_a_thread(work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


async def test_actions_of_other_threads_run_on_the_loop_in_order() -> None:
    handoff, done = Handoff(), asyncio.Event()
    handoff.open()
    ran: list[tuple[int, int]] = []

    def note(number: int) -> None:
        ran.append((number, threading.get_ident()))

    def hand_over() -> None:
        for number in range(100):
            handoff.run(partial(note, number))
        handoff.run(done.set)

    in_a_thread(hand_over)
    assert ran == []
    await asyncio.wait_for(done.wait(), patience(10))

    assert ran == [(number, threading.get_ident()) for number in range(100)]


async def test_an_action_of_the_loops_own_thread_runs_at_once() -> None:
    handoff = Handoff()
    handoff.open()
    ran: list[int] = []

    handoff.run(partial(ran.append, 1))

    assert ran == [1]
    assert handoff.is_own_thread()


async def test_many_actions_cost_one_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    handoff, done = Handoff(), asyncio.Event()
    loop = handoff.open()
    wake_ups: list[int] = []
    wake, actions = loop.call_soon_threadsafe, 50

    def counted(callback: Callable[..., object], *args: Any) -> Any:
        wake_ups.append(1)
        return wake(callback, *args)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)

    def hand_over() -> None:
        for _ in range(actions):
            handoff.run(lambda: None)

    in_a_thread(hand_over)
    in_a_thread(lambda: handoff.run(done.set))
    await asyncio.wait_for(done.wait(), patience(10))

    assert len(wake_ups) == 1


async def test_the_handler_of_a_signal_is_heard_that_interrupts_the_waking(monkeypatch: pytest.MonkeyPatch) -> None:
    handoff = Handoff()
    loop = handoff.open()
    wake, heard = loop.call_soon_threadsafe, threading.Event()
    answered: list[bool] = []

    def interrupted(callback: Callable[..., object], *args: Any) -> Any:
        monkeypatch.setattr(loop, "call_soon_threadsafe", wake)
        handoff.run(heard.set)
        answered.append(heard.wait(patience(1)))
        return wake(callback, *args)

    monkeypatch.setattr(loop, "call_soon_threadsafe", interrupted)
    await asyncio.to_thread(handoff.run, lambda: None)

    assert answered == [True]


def test_what_comes_after_the_end_runs_where_it_is_handed_over() -> None:
    handoff = Handoff()
    asyncio.run(_open_and_close(handoff))
    ran: list[int] = []

    in_a_thread(lambda: handoff.run(lambda: ran.append(threading.get_ident())))

    assert len(ran) == 1
    assert ran != [threading.get_ident()]


async def _open_and_close(handoff: Handoff) -> None:
    handoff.open()
    handoff.close()
