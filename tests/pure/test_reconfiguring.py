"""When a replica may take up another user_config; its worker gives it a turn once for each generation."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from qserve_workers.replica.birth import Wishes
from qserve_workers.replica.reconfiguring import Reconfiguring
from qserve_workers.replica.replica_events import TurnWanted
from tests.support.waiting import until


class Replica:
    """One that serves, and was born with leave to do so."""

    def __init__(self) -> None:
        self.wishes = Wishes()
        self.wishes.may_serve.set()
        self.changed = asyncio.Event()
        self.told: list[TurnWanted] = []
        nothing: Any = None
        events: Any = SimpleNamespace(tell=self.told.append)
        self.reconfiguring = Reconfiguring("Code#1", nothing, self.wishes, self.changed, events)

    async def asks(self, generation: int) -> "asyncio.Task[bool]":
        """Once it has asked for its turn."""
        before = len(self.told)
        task = asyncio.create_task(self.reconfiguring.has_turn(generation))
        await until(lambda: len(self.told) > before)
        assert self.told[-1] == TurnWanted(generation=generation)
        return task


@pytest.fixture
async def replica() -> Replica:
    return Replica()


async def test_a_turn_that_comes_while_something_else_changes_is_not_lost(replica: Replica) -> None:
    asking = await replica.asks(2)
    replica.changed.set()  # it is paused, say, or Redis is back
    assert not await asking

    replica.changed.clear()
    replica.wishes.may_serve.set()  # while the replica reads what has changed
    assert await (await replica.asks(2))


async def test_a_turn_is_for_one_generation(replica: Replica) -> None:
    asking = await replica.asks(2)
    assert not asking.done()
    replica.wishes.may_serve.set()
    assert await asking

    asking = await replica.asks(3)
    replica.changed.set()
    assert not await asking


async def test_a_replica_that_is_to_leave_has_no_turn(replica: Replica) -> None:
    asking = await replica.asks(2)
    replica.wishes.shall_leave.set()
    assert not await asking
