"""What a long queue costs: memory per call, and whether putting, reading and taking over get slower as it grows.

Run it with `python -m benchmarks.backlog`. It starts a server of its own, which writes nothing to disk, and uses the
scripts and connections that callers and replicas use.
"""

import asyncio
import itertools
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from qserve.broker.call_queue import CALLS_PER_ADMIT, CallQueue
from qserve.broker.connection import Connection
from qserve.broker.instance.heartbeats import DIED
from qserve.broker.instance.state import State
from qserve.broker.replica_queue import ReplicaQueue
from qserve.broker.server import embedded
from qserve.calls.process_client import new_event_loop
from qserve.errors import BrokerUnavailable
from qserve.settings import Settings
from qserve.wire.codec import Codec
from qserve.wire.messages import PYTHON, Call, Signer, encode
from qserve.wire.spec import DeploymentSpec, Target

LENGTHS = (1_000, 100_000, 1_000_000)
_SAMPLE, _TAKEN, _ROUNDS = 20_000, 1_000, 8
_READ, _TAKE = 100, 16  # as replicas do: a default one runs 100 calls at once, and takes over 16 per script
_AHEAD = 8  # scripts on their way at once
_TTL_MS = 3_600_000


@dataclass(frozen=True)
class Backlog:
    """The figures of a queue of one length: bytes in Redis per call, and calls per second in the best round."""

    length: int
    bytes_each: float
    admitted_per_s: float
    answered_per_s: float
    taken_per_s: float


class _Queue:
    """Both ends of one queue. All queues are on one server and take turns, so that noise is the same for all."""

    def __init__(self, settings: Settings, connection: Connection, length: int) -> None:
        self.length = length
        self._name = name = f"Backlog{length}"
        self._connection = connection
        self._keys = settings.keys
        self.spec = DeploymentSpec(name=name, target=Target("m:C"), revision="r", max_queued_requests=length + _SAMPLE)
        signer = Signer(settings.secrets)
        payload = Codec(allow_pickle=True, max_bytes=settings.max_value_bytes).pack_call(("a few words", 7), {})
        caller = "c" * 32
        calls = [
            Call(f"{caller}{number:x}", name, caller, _TTL_MS, PYTHON, "", False, payload) for number in range(10_000)
        ]
        self._calls = itertools.cycle([(call.id, False, signer.seal(encode(call))) for call in calls])
        self._caller = CallQueue(settings.keys, name)
        self._me = ReplicaQueue(settings.keys, name, "me")
        self._other = ReplicaQueue(settings.keys, name, "other")
        self._refused = 0

    async def admit(self, count: int) -> None:
        """Put a number of calls, as a busy client does."""
        for number, start in enumerate(range(0, count, CALLS_PER_ADMIT)):
            batch = list(itertools.islice(self._calls, min(CALLS_PER_ADMIT, count - start)))
            self._caller.put(self._connection, batch, self._check)
            if number % _AHEAD == 0:
                await self._connection.call("PING")
        await self._connection.call("PING")
        assert not self._refused

    def _check(self, answer: object) -> None:
        self._refused += not isinstance(answer, list) or None in answer

    async def read(self, replica: ReplicaQueue, most: int) -> list[bytes]:
        """Read the next calls."""
        answered: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        replica.read(self._connection, answered.set_result, most=most, block_ms=1)
        return [entry.id for entry in replica.entries(await answered)]

    async def answer(self, count: int) -> None:
        """Read a number of calls and answer them."""
        for _ in range(0, count, _READ):
            await self._reply(await self.read(self._me, _READ))

    async def take(self) -> None:
        """Take over the calls of a dead replica."""
        while entries := await self._me.take(self._connection, "other", DIED.encode(), most=_TAKE, up_to=99):
            self._taken += [entry.id for entry in entries]

    async def die(self, count: int) -> None:
        """Let a replica die that had taken a number of calls."""
        await self.read(self._other, count)
        await self._connection.call("HSET", self._keys.heartbeats(self._name), "other", DIED)
        self._taken: list[bytes] = []

    async def settle(self) -> None:
        """Answer the calls that were taken over, and put as many again."""
        await self._reply(self._taken)
        await self.admit(len(self._taken))

    async def _reply(self, entries: list[bytes]) -> None:
        for start in range(0, len(entries), _READ):
            some = entries[start : start + _READ]
            answered: asyncio.Future[object] = asyncio.get_running_loop().create_future()
            self._me.reply(self._connection, "c" * 32, [(entry, b"frame") for entry in some], answered.set_result)
            assert await answered == len(some)

    async def memory(self) -> int:
        """The bytes of memory that the server uses."""
        answer = await self._connection.call("INFO", "memory")
        return int(dict(line.split(b":", 1) for line in answer.split() if b":" in line)[b"used_memory"])


async def _rate(count: int, work: Callable[[], Awaitable[None]]) -> float:
    began = time.perf_counter()
    await work()
    return count / (time.perf_counter() - began)


async def _measure(queues: list[_Queue]) -> list[Backlog]:
    sizes = []
    for queue in queues:
        empty = await queue.memory()
        await queue.admit(queue.length)
        sizes.append((await queue.memory() - empty) / queue.length)
    rounds = [[await _rates(queue) for queue in queues] for _ in range(_ROUNDS)]
    rates = zip(*rounds[1:], strict=True)  # not the first one, in which what starts slowly starts
    return [
        Backlog(queue.length, size, *map(max, zip(*found, strict=True)))
        for queue, size, found in zip(queues, sizes, rates, strict=True)
    ]


async def _rates(queue: _Queue) -> tuple[float, float, float]:
    admitted = await _rate(_SAMPLE, lambda: queue.admit(_SAMPLE))
    answered = await _rate(_SAMPLE, lambda: queue.answer(_SAMPLE))
    await queue.die(_TAKEN)
    taken = await _rate(_TAKEN, queue.take)
    await queue.settle()
    return admitted, answered, taken


async def _connected(url: str) -> Connection:
    for _ in range(1000):
        try:
            return await Connection.open(url)
        except BrokerUnavailable:  # it has only just been started
            await asyncio.sleep(0.01)
    raise SystemExit("the server did not start")


def run() -> list[Backlog]:
    """Measure queues of all LENGTHS."""

    async def measured(settings: Settings) -> list[Backlog]:
        connection = await _connected(settings.redis_url)
        queues = [_Queue(settings, connection, length) for length in LENGTHS]
        state = State(settings.redis_url, settings.keys, Signer(settings.secrets))
        for queue in queues:
            state.deploy(queue.spec, expected=0)
        state.close()
        return await _measure(queues)

    with tempfile.TemporaryDirectory(prefix="qs-") as folder:
        process = subprocess.Popen(embedded.command(Path(folder)))
        try:
            settings = Settings(redis_url=embedded.redis_url(Path(folder)), secret="s" * 32)
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                return runner.run(measured(settings))
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    for backlog in run():
        print(backlog)
