"""When the clients of a process send: what they have for the servers of a cluster leaves together."""

import asyncio
from collections.abc import Callable

from qserve.broker.connection import Connection


class EndOfTick:
    """The end of each event-loop tick in which something was put or read. Belongs to the event loop of the clients."""

    def __init__(self) -> None:
        self._puts: list[Callable[[], Connection]] = []
        self._reads: list[Callable[[], None]] = []

    def put(self, put: Callable[[], Connection]) -> None:
        """Have calls put, on the connection that `put` returns, which is then flushed."""
        if not (self._puts or self._reads):
            asyncio.get_running_loop().call_soon(self._run)
        self._puts.append(put)

    def read(self, read: Callable[[], None]) -> None:
        """Have a read begun after all calls were put and before they are written, so that it can leave with them."""
        if not (self._puts or self._reads):
            asyncio.get_running_loop().call_soon(self._run)
        self._reads.append(read)

    def _run(self) -> None:
        puts, reads = self._puts, self._reads
        self._puts, self._reads = [], []
        senders = [put() for put in puts]
        for read in reads:
            read()
        for sender in senders:
            sender.flush()
