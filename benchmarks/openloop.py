"""An open-loop load generator: it sends each request when it is due, whatever has become of those before.

It runs in a process of its own, which gets a `Plan`, says when it is ready, begins when it is told to, and writes a
list of `Request`. Latency counts from the time at which a request was due, so that a server which stalls cannot hide
that by slowing the client down (coordinated omission).
"""

import asyncio
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import msgspec
import uvloop

from benchmarks import processes
from qserve import serve
from qserve.background import spawn
from qserve.calls.process_client import current_client
from qserve.errors import BackPressureError, QServeError

UNANSWERED, BROKEN = -1, 0
"""In place of a status: no answer within the plan's patience, and a connection that was closed instead of answered."""
_IDLE_S = 3.0  # gateways close connections that were idle for 5 s
_CONNECTIONS = 400  # to one gateway: enough for a full queue and the refusals beside it
_TICK_S = 0.001
_head = re.compile(rb"HTTP/1\.1 (\d+)")
_length = re.compile(rb"(?i)\r\ncontent-length: (\d+)")
_retry = re.compile(rb"(?i)\r\nretry-after: (\d+)")


class Phase(msgspec.Struct, array_like=True):
    """Requests at random moments, at some rate per second, for some seconds."""

    rate: float
    seconds: float


class Plan(msgspec.Struct):
    """What a generator sends.

    Attributes:
        targets: URLs, which are used in turn, or the name of one deployment, which is called through a handle.
        closed: If not 0, send over this number of connections whenever an answer has come, and not at a rate.
        trickling: The number of further connections that send a byte of a request now and then.
        patience_s: How long to wait for answers after the last phase.
    """

    targets: list[str]
    phases: list[Phase]
    seed: int = 0
    closed: int = 0
    trickling: int = 0
    patience_s: float = 30.0


class Request(msgspec.Struct, array_like=True):
    """What became of one request.

    Attributes:
        due: When it should be sent.
        lag: Seconds by which the generator sent it late.
        seconds: Time from `due` to the answer.
        status: The HTTP status; for a call through a handle, 200 or the status of its error.
        retry_after: The seconds to wait that the answer names, or 0.
        swapped: Whether the answer belongs to another request.
    """

    due: float
    lag: float
    seconds: float
    status: int
    retry_after: float = 0.0
    swapped: bool = False


class Generator:
    """A load generator that runs beside this process."""

    def __init__(self, plan: Plan, runtime_dir: str) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `result`
        number = self._output.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.openloop", msgspec.json.encode(plan).decode(), str(number)],
            cwd=processes.ROOT,
            env=processes.environment(runtime_dir),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(number,),
        )

    def wait_until_ready(self) -> None:
        """Wait until the generator is connected and waits for `begin`."""
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def begin(self, start: float) -> None:
        """Tell the generator when its plan begins, on the monotonic clock of this machine."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{start}\n".encode())
        self._process.stdin.close()

    def result(self) -> list[Request]:
        """Wait for the end of the plan, and return what became of the requests."""
        with self._output, self._process:
            if self._process.wait():
                raise SystemExit("a load generator failed")
            self._output.seek(0)
            return msgspec.msgpack.decode(self._output.read(), type=list[Request])


Done = Callable[[int, float, str], None]
"""Gets status, seconds to wait before another try, and the number that was echoed."""


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on its way."""

    def __init__(self, target: "_Target") -> None:
        self._target = target
        self._received = b""
        self.transport: asyncio.Transport
        self.done: Done | None = None
        self.used_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's does not say that it is one

    def send(self, request: bytes, done: Done) -> None:
        self.done = done
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, ending, body = self._received.partition(b"\r\n\r\n")
        length = _length.search(head)
        if not ending or length is None or len(body) < int(length[1]):
            return
        self._received = b""
        status, retry = _head.match(head), _retry.search(head)
        done, self.done = self.done, None
        self.used_at = time.monotonic()
        self._target.free(self)
        if done is not None and status is not None:
            done(int(status[1]), float(retry[1]) if retry else 0.0, body.decode("latin-1"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._target.lost(self)
        done, self.done = self.done, None
        if done is not None:
            done(BROKEN, 0.0, "")


class _Target:
    """A URL and the connections to it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.address = (parts.hostname or "", parts.port or 80)
        self._line = f"GET {parts.path}?n=".encode()
        self._rest = f" HTTP/1.1\r\nhost: {parts.netloc}\r\n\r\n".encode()
        self._idle: deque[_Connection] = deque()
        self._waiting: deque[tuple[bytes, Done]] = deque()
        self._open = 0

    def send(self, number: str, done: Done) -> None:
        request = self._line + number.encode() + self._rest
        while self._idle:
            connection = self._idle.pop()
            if time.monotonic() - connection.used_at < _IDLE_S:
                connection.send(request, done)
                return
            connection.transport.close()
        if self._open < _CONNECTIONS:
            self._open += 1
            spawn(self._send_on_another(request, done))
        else:
            self._waiting.append((request, done))

    def free(self, connection: _Connection) -> None:
        """Take back a connection whose answer has come."""
        if self._waiting:
            connection.send(*self._waiting.popleft())
        else:
            self._idle.append(connection)

    def lost(self, connection: _Connection) -> None:
        """Note that a connection was closed."""
        self._open -= 1
        if connection in self._idle:
            self._idle.remove(connection)

    async def _send_on_another(self, request: bytes, done: Done) -> None:
        try:
            connection = await self._connect()
        except OSError:
            self._open -= 1
            done(BROKEN, 0.0, "")
        else:
            connection.send(request, done)

    async def _connect(self) -> _Connection:
        _, connection = await asyncio.get_running_loop().create_connection(lambda: _Connection(self), *self.address)
        return connection

    async def trickle(self, pause_s: float) -> None:
        """Begin requests without ending them, on a connection that is opened again when the gateway has closed it."""
        while True:
            try:
                reader, writer = await asyncio.open_connection(*self.address)
                for byte in self._line + b"0 HTTP/1.1\r\nx-slow: " + b"x" * 1000:
                    writer.write(bytes((byte,)))
                    await asyncio.wait({asyncio.ensure_future(asyncio.sleep(pause_s))})
                    if reader.at_eof() or writer.is_closing():
                        break
                writer.close()
            except OSError:
                await asyncio.sleep(pause_s)


class _Handle:
    """A deployment called through a handle."""

    def __init__(self, deployment: str) -> None:
        self._handle = serve.get_deployment(deployment).get_handle().options(method_name="hold")
        current_client()  # connects

    def send(self, number: str, done: Done) -> None:
        ref = self._handle.remote(number)
        ref.add_done_callback(lambda ended: _tell(ended, done))


def _tell(ref: Any, done: Done) -> None:
    error = ref.exception(0)
    if error is None:
        done(200, 0.0, ref.result(0))
    else:
        retry_after = error.retry_after if isinstance(error, BackPressureError) else 0.0
        done(error.status if isinstance(error, QServeError) else 500, retry_after, "")


class _Run:
    """A plan that is being carried out."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._targets = [_Target(target) if "://" in target else _Handle(target) for target in plan.targets]
        self._sent = 0
        self._on_their_way: dict[str, tuple[float, float]] = {}
        self._seen: list[Request] = []
        self._next: Callable[[], None] = lambda: None

    async def carry_out(self, start: float) -> list[Request]:
        trickling = [
            asyncio.create_task(target.trickle(0.5 + index / self._plan.trickling))
            for index in range(self._plan.trickling)
            if isinstance(target := self._targets[index % len(self._targets)], _Target)
        ]
        await asyncio.sleep(max(0.0, start - time.monotonic()))
        await (self._closed_loop() if self._plan.closed else self._open_loop(start))
        end = time.monotonic() + self._plan.patience_s
        while self._on_their_way and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for due, lag in list(self._on_their_way.values()):
            self._seen.append(Request(due, lag, time.monotonic() - due, UNANSWERED))
        for task in trickling:
            task.cancel()
        return self._seen

    async def _open_loop(self, start: float) -> None:
        times = arrivals(self._plan, start)
        due = next(times, None)
        while due is not None:
            now = time.monotonic()
            if due > now:
                await asyncio.sleep(max(due - now, _TICK_S))
                continue
            self._send(due, now)
            due = next(times, None)

    async def _closed_loop(self) -> None:
        seconds = sum(phase.seconds for phase in self._plan.phases)
        self._next = lambda: self._send(time.monotonic(), time.monotonic())
        for _ in range(self._plan.closed):
            self._next()
        await asyncio.sleep(seconds)
        self._next = lambda: None

    def _send(self, due: float, now: float) -> None:
        number = f"{self._plan.seed}.{self._sent}"
        self._on_their_way[number] = due, now - due

        def done(status: int, retry_after: float, echoed: str) -> None:
            seconds = time.monotonic() - due
            del self._on_their_way[number]
            swapped = status == 200 and echoed.strip('"') != number
            self._seen.append(Request(due, now - due, seconds, status, retry_after, swapped))
            self._next()

        target = self._targets[self._sent % len(self._targets)]
        self._sent += 1
        target.send(number, done)


def arrivals(plan: Plan, begin: float) -> Iterator[float]:
    """The times at which requests are due: a Poisson process whose rate changes from phase to phase."""
    chance = random.Random(plan.seed)
    for phase in plan.phases:
        due = begin
        while phase.rate and (due := due + chance.expovariate(phase.rate)) < begin + phase.seconds:
            yield due
        begin += phase.seconds


def main() -> None:
    run = _Run(msgspec.json.decode(sys.argv[1], type=Plan))
    print("ready", flush=True)
    start = float(sys.stdin.readline())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        seen = runner.run(run.carry_out(start))
    os.write(int(sys.argv[2]), msgspec.msgpack.encode(seen))


if __name__ == "__main__":
    main()
