"""The template of a node: a process that has imported all that a worker needs, and forks the workers.

A worker that is forked starts at once, and shares the memory of what was imported with all others. It is no child of
the template, which may die and be started again, but of the node, as if the node had started it.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

import msgspec

from qserve_workers.children import AdoptedProcess, Process, Start, adopt_orphans, program
from qserve_workers.supervise import KeptProcess

logger = logging.getLogger("qserve.node")

_ANSWER_WITHIN_S = 30.0
_GRACE_S = 1.0
_ABOUT = "forks the workers of this node, which so start at once and share their memory"
"""Stands on its command line, for `ps`. The titles of the workers take its place, which is why it is that long."""


class ForkOrder(msgspec.Struct):
    """What a node asks of its template.

    Attributes:
        arguments: Of the worker, as on the command line of `celery -A qserve_workers worker`.
        death_signal: What the worker gets when the node dies.
        node: Pid of the node.
    """

    arguments: list[str]
    death_signal: int
    node: int


class Forked(msgspec.Struct):
    """What the template answers: the pid of a worker, or why there is none."""

    pid: int = 0
    error: str = ""


class Template:
    """Keeps the template running and has it fork workers.

    Args:
        environment: That of the workers.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._process = KeptProcess("template", self._start)
        self._turn = asyncio.Lock()
        self._connected = asyncio.Event()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def start(self) -> None:
        """Start it. It can be asked at once, and answers when it has imported everything."""
        adopt_orphans()
        self._process.start()

    async def stop(self, force: asyncio.Event) -> None:
        """Stop it; the workers go on."""
        await self._process.stop(_GRACE_S, force)
        if self._streams is not None:
            self._streams[1].close()

    def worker(self, arguments: Sequence[str], death_signal: signal.Signals) -> Start:
        """A worker with these arguments, which gets the signal when this process dies."""
        order = ForkOrder(list(arguments), death_signal, os.getpid())

        async def start() -> Process:
            asking = asyncio.create_task(self._ask(order))
            try:
                return await asyncio.shield(asking)
            except asyncio.CancelledError:
                asking.add_done_callback(_end_unwanted)
                raise

        return start

    async def _start(self) -> Process:
        here, there = socket.socketpair()
        with there:
            command = [sys.executable, "-m", "qserve_workers.template", _ABOUT]
            start = program(lambda: command, self._environment, death_signal=signal.SIGKILL, stdin=there.fileno())
            process = await start()
        self._streams = await asyncio.open_connection(sock=here)
        self._connected.set()
        return process

    async def _ask(self, order: ForkOrder) -> AdoptedProcess:
        async with self._turn:
            while True:
                await self._connected.wait()
                assert self._streams is not None
                reader, writer = self._streams
                answer = b""
                with contextlib.suppress(ConnectionError):
                    writer.write(msgspec.json.encode(order) + b"\n")
                    answer = await self._answer(reader)
                if answer:
                    break
                # It has died, and what it was asked has not been done: a worker runs only after the answer.
                writer.close()
                self._connected.clear()
        forked = msgspec.json.decode(answer, type=Forked)
        if forked.error:
            raise OSError(forked.error)
        return AdoptedProcess(forked.pid)

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            async with asyncio.timeout(_ANSWER_WITHIN_S):
                return await reader.readline()
        except TimeoutError:
            logger.warning("The template has not answered for %g s; it is started again.", _ANSWER_WITHIN_S)
            self._process.kill()
            return b""


def _end_unwanted(asking: "asyncio.Task[AdoptedProcess]") -> None:
    if not asking.cancelled() and asking.exception() is None:
        asking.result().send_signal(signal.SIGKILL)
