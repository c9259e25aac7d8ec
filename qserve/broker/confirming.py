"""Submissions that count only when they are on the disk of Redis, or when a replica of it has them, too."""

import asyncio
from typing import Any

from qserve.background import spawn
from qserve.broker.connection import Answer, Connection
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.scripts import SUBMIT
from qserve.errors import BrokerUnavailable, ConfigurationError
from qserve.wire.call_record import Durability

PATIENCE_S = 5.0
"""How long Redis may take; with appendfsync everysec a second is usual."""
_SLACK_S = 2.0
_AT_ONCE = 512
_WAITS: dict[Durability, tuple[str, ...]] = {"fsync": ("WAITAOF", "1", "0"), "replica": ("WAIT", "1")}
_SILENT = "Redis has not answered in time: the call may run all the same, or be lost"
_MISSING: dict[Durability, str] = {
    "fsync": "Redis has not written it to its disk",
    "replica": "no replica of Redis has it",
}


class Confirmed:
    """Submits on a connection of its own, whose answers Redis holds back until what was written is safe.

    What comes meanwhile is written together, and waited for together.
    """

    def __init__(self, url: str, durability: Durability) -> None:
        self._url = url
        self._durability = durability
        self._connection: Connection | None = None
        self._waiting: list[tuple[tuple[Any, ...], asyncio.Future[Answer]]] = []
        self._runs = False

    async def submit(self, arguments: tuple[Any, ...]) -> Answer:
        """Submit what `submit_arguments` has made, wait until it is safe, and return what submit.lua returns.

        Raises:
            BrokerUnavailable: It is not known to be safe, nor to have run.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((arguments, future))
        if not self._runs:
            self._runs = True
            spawn(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:_AT_ONCE], self._waiting[_AT_ONCE:]
                try:
                    answers = await self._write([arguments for arguments, _ in batch])
                except (BrokerUnavailable, ConfigurationError, CommandRefused, TimeoutError) as exc:
                    self.close()
                    answers = [BrokerUnavailable(str(exc) or _SILENT)] * len(batch)
                for (_, future), answer in zip(batch, answers, strict=True):
                    if isinstance(answer, BaseException):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
        finally:
            self._runs = False

    async def _write(self, batch: list[tuple[Any, ...]]) -> list[Answer]:
        if self._connection is None or not self._connection.is_open:
            self._connection = await Connection.open(self._url)
        connection = self._connection
        async with asyncio.timeout(PATIENCE_S + _SLACK_S):
            runs = (SUBMIT.call(connection, names, *arguments) for names, *arguments in batch)
            answers = await asyncio.gather(*runs, return_exceptions=True)
            reached: Any = await connection.call(*_WAITS[self._durability], int(PATIENCE_S * 1000))
        if (reached[0] if isinstance(reached, list) else reached) < 1:
            text = f"after {PATIENCE_S:g} s {_MISSING[self._durability]}; the call may run all the same, or be lost"
            raise BrokerUnavailable(f"{text}. Submit it again if it does no harm to run it twice")
        return answers

    def close(self) -> None:
        """Close the connection; the next batch opens another one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
