"""The connections for commands of one process to the servers of a cluster: one for each, which its shards share."""

import asyncio
from collections.abc import Callable
from functools import partial

from qserve.broker.connection import PRIMARY_TIMEOUT_S, Connection
from qserve.broker.lanes.end_of_tick import EndOfTick
from qserve.broker.lanes.lane import Lane
from qserve.broker.server.address import Address, Broker, parse
from qserve.broker.server.redis_clients import primaries_async, unreachable
from qserve.errors import BrokerUnavailable


class Lines:
    """Belongs to one event loop. A connection is made when it is first needed, and closed when nobody needs it.

    Attributes:
        end_of_tick: When what has come meanwhile leaves on them.
    """

    def __init__(self) -> None:
        self.end_of_tick = EndOfTick()
        self._lines: dict[Address, Connection] = {}
        self._lanes: dict[Address, list[Lane]] = {}
        self._opening: dict[Address, asyncio.Lock] = {}

    async def lane(
        self, url: str, on_lost: Callable[[], None] | None = None, on_moved: Callable[[], None] | None = None
    ) -> Lane:
        """A lane to the primary of a slot; like `Connection.open`."""
        broker = parse(url)
        problems: list[str] = []
        async for address in primaries_async(broker, problems):
            try:
                line = await self._line(address, broker.at(address))
            except BrokerUnavailable as exc:
                problems.append(str(exc))
                continue
            lane = Lane(line, partial(self._left, address), on_lost, on_moved)
            self._lanes.setdefault(address, []).append(lane)
            return lane
        raise BrokerUnavailable(unreachable(broker, problems))

    async def _line(self, address: Address, server: Broker) -> Connection:
        async with self._opening.setdefault(address, asyncio.Lock()):  # others who want it, too, wait for it
            line = self._lines.get(address)
            if line is None or not line.is_open:
                line = Connection(partial(self._lost, address), _stay)
                self._lines[address] = await line.open_at(server, PRIMARY_TIMEOUT_S)
            return line

    def _left(self, address: Address, lane: Lane) -> None:
        self._lanes[address].remove(lane)
        if not self._lanes[address]:
            self._lines.pop(address).close()

    def _lost(self, address: Address) -> None:
        for lane in list(self._lanes.get(address, ())):
            lane.line_lost()


def _stay() -> None:
    """One shard of a server has gone: its lane is told, and the others stay."""
