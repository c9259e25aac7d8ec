"""How a replica waits for new calls: one blocking read at a time, which can be ended without losing a call."""

import asyncio
from collections.abc import Callable

from qserve.broker.connection import Answer
from qserve.broker.link import BLOCK_MS, Link
from qserve.broker.replica_queue import ReplicaQueue
from qserve_workers.calls.answers import Answers


class QueueReading:
    """The read under way, if there is one. Belongs to the replica's event loop.

    Args:
        answers: Those that are ready leave with the next read.
        on_answer: Gets what came of each read; `ReplicaQueue.entries` makes entries of it.

    Attributes:
        is_under_way: Whether there is one.
        most: How many calls it may bring; 0 where there is none.
        more_wait: Whether the last read brought as many calls as it might.
        begun: How many calls ran after the last read, before any of them ended.
    """

    def __init__(self, queue: ReplicaQueue, link: Link, answers: Answers, on_answer: Callable[[Answer], None]) -> None:
        self._queue = queue
        self._link = link
        self._answers = answers
        self._on_answer = on_answer
        self._reader = 0
        self._ended = asyncio.Event()
        self._block_ms = BLOCK_MS
        self.is_under_way = self.more_wait = False
        self.most = self.begun = 0

    async def link_up(self) -> None:
        """There is a new pair of connections."""
        self._reader = await self._queue.reader_id(self._link.waiter)

    def read(self, most: int) -> None:
        """Wait for up to so many calls."""
        self.is_under_way = True
        self.most, self.begun = most, 0
        link, answers = self._link, self._answers
        # Else they might overtake what was sent before, such as parts of a stream.
        takes_answers = link.sender.is_idle and answers.put_on(link.waiter)
        self._queue.read(link.waiter, self._answered, most=most, block_ms=self._block_ms)
        if takes_answers:
            answers.were_sent()

    def cut_short(self) -> None:
        """Let the read end now.

        On the server, where an entry is either delivered whole or not at all; a read cancelled here would lose some.
        """
        if self.is_under_way and self._link.sender.is_open:
            self._queue.end_read(self._link.sender, self._reader)

    async def end(self) -> None:
        """Let the read end, and wait until it has."""
        while self.is_under_way and self._link.sender.is_open:
            self._ended.clear()
            self.cut_short()
            await self._ended.wait()

    def _answered(self, answer: Answer) -> None:
        self.is_under_way = False
        self.more_wait = bool(answer) and not isinstance(answer, Exception) and len(answer[0][1]) == self.most
        self.most = 0
        self._ended.set()
        self._block_ms = BLOCK_MS if answer else int(1000 * self._link.pause_s)
        self._on_answer(answer)
