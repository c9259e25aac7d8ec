"""Replies through a list or through a stream, compared with the same frames and batches and one process on each side.

    python -m benchmarks.reply_queue

One side answers calls in batches with REPLY (with RPUSH in place of XADD for the list); the other one reads the
replies (with BLMPOP, or with XREAD and a trim now and then). The entries to answer are put and
read beforehand, so that only the replies are measured.
"""

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import redis

from qserve.broker.connection import Answer, Connection
from qserve.broker.inboxes import Inbox
from qserve.broker.keys import GROUP, Keys
from qserve.broker.scripts import REPLY, Script
from qserve.broker.server import embedded
from qserve.calls.process_client import new_event_loop
from qserve.wire.messages import VALUE, Reply, Signer, encode

KEYS = Keys("bench")
STREAM, INBOX, ALIVE = KEYS.calls("Noop"), KEYS.inbox("caller"), KEYS.alive("caller")
CALLS, ROUNDS = 25_600, 5
IN_FLIGHT = 8
"""Batches that are on their way at a time."""
MOST = 512
TRIM_AFTER = 512 * 1024
"""Bytes, as the receiver has it."""


REPLY_TO_LIST = Script(
    REPLY.source.replace("'XADD', KEYS[2], '*',", "'RPUSH', KEYS[2],").replace("message[#message + 1] = 'd'\n", "")
)
assert "RPUSH" in REPLY_TO_LIST.source
assert "'d'" not in REPLY_TO_LIST.source


class ListReader:
    """Reads replies from a list."""

    script = REPLY_TO_LIST

    def read(self, connection: Connection, on_answer: Callable[[Answer], None]) -> None:
        connection.send_now(on_answer, "BLMPOP", 1, 1, INBOX, "LEFT", "COUNT", MOST)

    def count(self, _connection: Connection, answer: Answer) -> int:
        return len(answer[1]) if answer else 0


class StreamReader:
    """Reads replies from a stream as a client does."""

    script = REPLY

    def __init__(self) -> None:
        self._inbox = Inbox(KEYS, "caller")
        self._untrimmed = 0

    def read(self, connection: Connection, on_answer: Callable[[Answer], None]) -> None:
        self._inbox.read(connection, on_answer, block_ms=1000, most=MOST)

    def count(self, connection: Connection, answer: Answer) -> int:
        number = len(self._inbox.frames(answer))
        self._untrimmed += number
        if self._untrimmed >= TRIM_AFTER:
            self._untrimmed = 0
            self._inbox.trim(connection)
        return number


def measure(url: str, reader: ListReader | StreamReader, batch: int) -> float:
    """Replies per second from one side to the other."""
    entries = given_out(url)
    frame = Signer((b"k",)).seal(encode(Reply("c" * 36, "caller", VALUE, b"\xa2ok")))

    async def run() -> float:
        sender, writer, waiter = [await Connection.open(url) for _ in range(3)]
        done = asyncio.get_running_loop().create_future()
        seen = sent = 0

        def answer(_answer: Answer = None) -> None:
            nonlocal sent
            if sent < CALLS:
                pairs = [part for entry in entries[sent : sent + batch] for part in (entry, frame)]
                sent += batch
                reader.script.send(sender, answer, (STREAM, INBOX, ALIVE), GROUP, 60_000, "1", *pairs)

        def receive(replies: Answer) -> None:
            nonlocal seen
            if done.done():
                return
            seen += reader.count(writer, replies)
            reader.read(waiter, receive)
            if seen == CALLS:
                done.set_result(None)

        started = time.perf_counter()
        reader.read(waiter, receive)
        for _ in range(IN_FLIGHT):
            answer()
        await done
        seconds = time.perf_counter() - started
        for connection in (sender, writer, waiter):
            connection.close()
        return CALLS / seconds

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(run())


def given_out(url: str) -> list[bytes]:
    """The entries of a number of calls, which have been put and read."""
    with redis.Redis.from_url(url, protocol=2) as client:
        client.flushall()
        client.set(ALIVE, "1")
        client.xgroup_create(STREAM, GROUP, "0", mkstream=True)
        with client.pipeline(transaction=False) as pipe:
            for _ in range(CALLS):
                pipe.xadd(STREAM, {"r": "c" * 36, "f": "", "d": b"x" * 150})
            entries: list[bytes] = pipe.execute()
        client.xreadgroup(GROUP, "replica", {STREAM: ">"}, count=CALLS)
        return entries


def compare(url: str) -> dict[int, tuple[float, float]]:
    """Replies per second through list and stream for each size of batch: medians of alternating rounds."""
    found = {}
    for batch in (1, 8, 64):
        rounds = [(measure(url, ListReader(), batch), measure(url, StreamReader(), batch)) for _ in range(ROUNDS)]
        through_list, through_stream = zip(*rounds, strict=True)
        found[batch] = median(through_list), median(through_stream)
    return found


def run() -> dict[int, tuple[float, float]]:
    """Compare on a server of its own."""
    with tempfile.TemporaryDirectory(prefix="qs-") as folder:
        server = subprocess.Popen(embedded.command(Path(folder)))
        try:
            while not embedded.socket_path(Path(folder)).exists():
                time.sleep(0.01)
            return compare(embedded.redis_url(Path(folder)))
        finally:
            server.kill()
            server.wait()


def main() -> None:
    for batch, (through_list, through_stream) in run().items():
        ratio = through_stream / through_list
        sys.stdout.write(
            f"{batch:3d} replies per script: list {through_list:9,.0f}/s, stream {through_stream:9,.0f}/s, "
            f"stream/list {ratio:.2f}\n"
        )


if __name__ == "__main__":
    main()
