"""The template of a node: a process that has imported all that a worker needs, and forks the workers.

A worker that is forked starts at once, and shares the memory of what was imported with all others. It is no child of
the template, which may die and be started again, but of the node, as if the node had started it.

A node that was forked itself, by the process of an instance, has had its template forked from the same image, with the
gateway in it: then gateways are forked, too.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from qserve_workers.children import AdoptedProcess, Process, Start, adopt_orphans, program
from qserve_workers.supervise import KeptProcess

logger = logging.getLogger("qserve.node")

_ANSWER_WITHIN_S = 30.0
_GRACE_S = 1.0
_ABOUT = "forks the workers of this node, which so start at once and share their memory"
"""Stands on its command line. The titles of the workers take its place, which is why it is that long."""
WITH_GATEWAY = "--with-gateway"
"""On its command line: it is to fork gateways, too."""


class ForkOrder(msgspec.Struct):
    """What a node asks of its template. A descriptor may come with it: the socket that a gateway listens on.

    Attributes:
        program: What to be.
        arguments: As on the command line of `celery -A qserve_workers worker`, or of `python -m qserve_gateway`.
        death_signal: What it gets when the node dies.
        node: Pid of the node.
        environment: What it finds in its environment beside that of the template.
    """

    program: Literal["worker", "gateway"]
    arguments: list[str]
    death_signal: int
    node: int
    environment: dict[str, str] = {}


class Forked(msgspec.Struct):
    """What the template answers: the pid of what it has forked, or why there is none."""

    pid: int = 0
    error: str = ""


@dataclass(frozen=True)
class FirstTemplate:
    """A template that runs already: it was forked from a process that had imported everything.

    Attributes:
        descriptor: The socket over which it is asked.
    """

    pid: int
    descriptor: int


class Template:
    """Keeps the template running and has it fork workers.

    Args:
        environment: That of the workers.
        first: The one to begin with; None: a program like those that follow it.

    Attributes:
        has_gateway: Whether it is to be asked for gateways.
    """

    def __init__(self, environment: Mapping[str, str], first: FirstTemplate | None = None) -> None:
        self._environment = environment
        self._first = first
        self.has_gateway = first is not None
        self._process = KeptProcess("template", self._start)
        self._turn = asyncio.Lock()
        self._connected = asyncio.Event()
        self._connection: socket.socket
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
        return self._forked(lambda: ForkOrder("worker", list(arguments), death_signal, os.getpid()))

    def gateway(
        self, arguments: Callable[[], Sequence[str]], environment: Mapping[str, str], descriptor: int | None
    ) -> Start:
        """A gateway; when this process dies, it finishes the requests that it has.

        Args:
            arguments: Asked before each start.
            environment: What it finds in its environment beside that of the workers.
            descriptor: The socket that it is to listen on; None: one of its own.
        """

        def order() -> ForkOrder:
            return ForkOrder("gateway", list(arguments()), signal.SIGTERM, os.getpid(), dict(environment))

        return self._forked(order, descriptor)

    def _forked(self, order: Callable[[], ForkOrder], descriptor: int | None = None) -> Start:
        async def start() -> Process:
            asking = asyncio.create_task(self._ask(order(), descriptor))
            try:
                return await asyncio.shield(asking)
            except asyncio.CancelledError:
                asking.add_done_callback(_end_unwanted)
                raise

        return start

    async def _start(self) -> Process:
        if self._first is not None:
            first, self._first = self._first, None
            await self._connect(socket.socket(fileno=first.descriptor))
            return AdoptedProcess(first.pid)
        here, there = socket.socketpair()
        with there:
            more = (WITH_GATEWAY,) if self.has_gateway else ()
            command = [sys.executable, "-m", "qserve_workers.template", *more, _ABOUT]
            start = program(lambda: command, self._environment, death_signal=signal.SIGKILL, stdin=there.fileno())
            process = await start()
        await self._connect(here)
        return process

    async def _connect(self, connection: socket.socket) -> None:
        self._connection = connection
        self._streams = await asyncio.open_connection(sock=connection)
        self._connected.set()

    async def _ask(self, order: ForkOrder, descriptor: int | None) -> AdoptedProcess:
        async with self._turn:
            while True:
                await self._connected.wait()
                assert self._streams is not None
                reader, writer = self._streams
                answer = b""
                with contextlib.suppress(ConnectionError):
                    line = msgspec.json.encode(order) + b"\n"
                    socket.send_fds(self._connection, [line[:1]], () if descriptor is None else (descriptor,))
                    writer.write(line[1:])
                    answer = await self._answer(reader)
                if answer:
                    break
                # It has died, and what it was asked has not been done: nothing runs before the answer.
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
