"""Inboxes: each process that calls or is called reads its replies and control messages from a stream of its own.

A stream, not a list: a reply whose delivery failed half-way is read again, which a popped list element is not
(benchmarks/results.md has what that costs).
"""

from collections.abc import Callable

import redis

from qserve.broker.connection import Answer, Connection, ignore_answer
from qserve.broker.instance.presence import CALLER_TTL_MS
from qserve.broker.keys import Keys
from qserve.broker.scripts import ADMIT, CLAIM, PRESENT, REPLY, TELL, TRIM, load_scripts
from qserve.broker.stream_ids import order
from qserve.wire.channel import Chunk
from qserve.wire.messages import CHUNK, CONTROL, Control, Reply, Signer, encode

INBOX_TTL_MS = 35_000
"""How long an inbox nobody reads is kept."""


class Inbox:
    """The messages to one process, which are read in order; a read that breaks off loses none."""

    def __init__(self, keys: Keys, process: str) -> None:
        self._stream = keys.inbox(process)
        self._alive = keys.alive(process)
        self._last = b"0-0"
        self._untrimmed = 0  # bytes

    def read(self, connection: Connection, on_answer: Callable[[Answer], None], *, block_ms: int, most: int) -> None:
        """Wait for messages after the last ones seen; `frames` turns the answer into frames."""
        connection.send_now(on_answer, "XREAD", "COUNT", most, "BLOCK", block_ms, "STREAMS", self._stream, self._last)

    def look(self, connection: Connection, on_answer: Callable[[Answer], None], *, most: int) -> None:
        """Like `read`, at the end of this tick and without waiting for messages."""
        connection.send(on_answer, "XREAD", "COUNT", most, "STREAMS", self._stream, self._last)

    def frames(self, answer: Answer) -> list[bytes]:
        """The frames of a read's answer, which now count as seen."""
        if not answer:
            return []
        entries = answer[0][1]
        self._last = entries[-1][0]
        frames = [frame for _, fields in entries for frame in fields[1::2]]
        self._untrimmed += sum(map(len, frames))
        return frames

    async def newest(self, connection: Connection) -> bytes:
        """The id of the last message in the inbox."""
        answer = await connection.call("XREVRANGE", self._stream, "+", "-", "COUNT", 1)
        return bytes(answer[0][0]) if answer else b"0-0"

    def has_seen(self, message: bytes) -> bool:
        """Whether a message has been read."""
        return order(message) <= order(self._last)

    def trim(self, connection: Connection) -> None:
        """Delete what was seen, and begin anew where the inbox is another one, which a clock set back may cause."""
        self._untrimmed = 0
        seen = self._last

        def check(answer: Answer) -> None:
            if answer == 0 and self._last == seen:
                self._last = b"0-0"

        TRIM.send(connection, check, (self._stream,), seen)

    @property
    def untrimmed(self) -> int:
        """How many bytes of seen messages are still stored."""
        return self._untrimmed

    def say_alive(self, connection: Connection) -> None:
        """Keep the inbox open for another CALLER_TTL_MS."""
        PRESENT.send(connection, ignore_answer, (self._alive, self._stream), CALLER_TTL_MS, INBOX_TTL_MS)

    async def open(self, connection: Connection) -> None:
        """Make sure replies are accepted before the first call is put."""
        load_scripts(connection, (ADMIT, CLAIM, REPLY, TELL))
        await PRESENT.call(connection, (self._alive, self._stream), CALLER_TTL_MS, INBOX_TTL_MS)

    def discard(self, connection: Connection) -> None:
        """Close the inbox for good; later replies are dropped."""
        connection.send(ignore_answer, "DEL", self._alive, self._stream)


def control_frame(signer: Signer, to: str, control: Control, about: str = "") -> bytes:
    """Return a control message that can be put into the inbox of `to`."""
    return signer.seal(encode(Reply(about, to, CONTROL, encode(control))))


def send_control(
    connection: Connection, keys: Keys, signer: Signer, to: str, control: Control, about: str = ""
) -> None:
    """Send a control message to a process, if it lives."""
    frame = control_frame(signer, to, control, about)
    TELL.send(connection, ignore_answer, (keys.inbox(to), keys.alive(to)), INBOX_TTL_MS, "0", frame)


def send_reply(connection: Connection, keys: Keys, signer: Signer, reply: Reply) -> None:
    """Answer a call that no replica has, if its caller lives."""
    frame = signer.seal(encode(reply))
    TELL.send(connection, ignore_answer, (keys.inbox(reply.to), keys.alive(reply.to)), INBOX_TTL_MS, "0", frame)


def send_chunk(
    connection: Connection,
    keys: Keys,
    signer: Signer,
    to: str,
    call: str,
    chunk: Chunk,
    on_answer: Callable[[Answer], None],
) -> None:
    """Send a chunk of a call's channel; `on_answer` gets 0 when the receiver seems to be gone."""
    frame = signer.seal(encode(Reply(call, to, CHUNK, encode(chunk))))
    TELL.send(connection, on_answer, (keys.inbox(to), keys.alive(to)), INBOX_TTL_MS, "1", frame)


def tell_now(client: redis.Redis, keys: Keys, to: str, frame: bytes) -> bool:
    """Put a frame into an inbox over redis-py, if its owner lives, and return whether it does; raises redis-py's
    errors."""
    return bool(TELL.run(client, (keys.inbox(to), keys.alive(to)), INBOX_TTL_MS, "0", frame))
