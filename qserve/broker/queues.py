"""The call queue and the inboxes on Redis: every script with the one place that calls it.

A deployment's calls stand in one stream, read by all of its replicas through one consumer group. An entry stays in the
stream until it is answered, so its length is queued + running. Replies go to the inbox of the calling process, a stream
too: a reply whose delivery failed half-way is read again, which a popped list element is not (benchmarks/results.md has
what that costs).
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import redis
from redis.exceptions import RedisError

from qserve.broker.connection import Answer, Connection, Script, ignore_answer
from qserve.broker.keys import GROUP, Keys
from qserve.errors import FrameRejected
from qserve.failpoints import reach
from qserve.wire.channel import Chunk
from qserve.wire.messages import CHUNK, CONTROL, DURABLE, ERROR, SAFE, Call, Control, Reply, Signer, decode_call, encode

INBOX_TTL_MS = 35_000
"""How long an inbox nobody reads is kept."""
ALIVE_TTL_MS = 25_000
"""How long a process counts as alive after it last said so: long, so that a server which stands still for 20 s forgets
nobody; within a minute nothing is left of a process that was killed. It says so every second, because a server whose
clock jumps forth forgets everybody at once, again and again if the clock does."""
DEAD, LEFT = "dead", "left"
"""Values in place of a heartbeat counter: died, and left after handing back what it had not started."""
DEAD_LETTERS_KEPT = 10_000
CALLS_PER_ADMIT = 256
_MOST_PENDING = 10_000
_PAGE = 500


def _load(name: str) -> Script:
    source = (Path(__file__).parent / "lua" / f"{name}.lua").read_text()
    return Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


ADMIT, FIND, REPLY = _load("admit"), _load("find"), _load("reply")
TELL, PRESENT, TRIM = _load("tell"), _load("present"), _load("trim")
BEAT, TAKE, START, RETIRE = _load("beat"), _load("take"), _load("start"), _load("retire")
DEAD_LETTER, CANCEL, EPOCH, CLAIM = _load("dead"), _load("cancel"), _load("epoch"), _load("claim")
DEMAND = _load("demand")


class Entry(NamedTuple):
    """A call's entry as Redis delivers it.

    Attributes:
        frame: The sealed Call.
        deliveries: Which start of the call comes next; from 2 on a replica has died that may have run it.
        durable: There is a record of the call, which gets its answer.
        call: Id of a durable call, as the entry says it.
    """

    id: bytes
    frame: bytes
    deliveries: int = 1
    durable: bool = False
    call: bytes = b""

    @property
    def time_ms(self) -> int:
        """When it was put, in ms on Redis' clock."""
        return int(self.id.split(b"-", 1)[0])


def _entry(raw: Sequence[Any], deliveries: int = 1) -> Entry:
    fields = dict(zip(raw[1][::2], raw[1][1::2], strict=True))
    durable = DURABLE.encode() in fields.get(b"f", b"")
    return Entry(raw[0], fields.get(b"d", b""), deliveries, durable, fields.get(b"r", b"") if durable else b"")


class CallQueue:
    """One deployment's queue, for callers: put and cancel."""

    def __init__(self, keys: Keys, deployment: str) -> None:
        waiting = (keys.due(deployment), keys.low(deployment))
        self._admit_keys = (keys.calls(deployment), keys.meta(deployment), keys.instance, *waiting)
        self._stream = keys.calls(deployment)
        self.is_idempotent = False
        """Whether all calls may run again, as Redis has said last."""

    def put(
        self,
        connection: Connection,
        calls: Sequence[tuple[str, bool, bytes]],
        on_answer: Callable[[Answer], None],
        *,
        latest_ms: int = 0,
    ) -> None:
        """Put (id, safe, frame) of at most CALLS_PER_ADMIT calls; `on_answer` gets what admit.lua returns.

        Args:
            latest_ms: When it is too late to, on Redis' clock; 0: never.
        """
        arguments: list[str | bytes | int] = [latest_ms]
        for call_id, safe, frame in calls:
            arguments += (call_id, SAFE if safe else "", frame)
        ADMIT.send(connection, on_answer, self._admit_keys, *arguments)

    async def find(self, connection: Connection, calls: Sequence[str], age_ms: int) -> list[bytes | None]:
        """Entries of calls by their ids, None for each that has none; the oldest was put `age_ms` ago at most."""
        found: list[bytes | None] = await FIND.call(connection, (self._stream,), age_ms, *calls)
        return found

    def cancel(self, connection: Connection, entry: bytes, on_answer: Callable[[Answer], None]) -> None:
        """Withdraw an entry; `on_answer` gets 1, 0 or the replica that has it."""
        CANCEL.send(connection, on_answer, (self._stream,), GROUP, entry)


class Inbox:
    """The messages to one process: read in order, none lost by a broken read."""

    def __init__(self, keys: Keys, process: str) -> None:
        self._stream = keys.inbox(process)
        self._alive = keys.alive(process)
        self._last = b"0-0"
        self._untrimmed = 0  # bytes

    def read(self, connection: Connection, on_answer: Callable[[Answer], None], *, block_ms: int, most: int) -> None:
        """Wait for messages after the last ones seen; `frames` turns the answer into frames."""
        connection.send_now(on_answer, "XREAD", "COUNT", most, "BLOCK", block_ms, "STREAMS", self._stream, self._last)

    def frames(self, answer: Answer) -> list[bytes]:
        """The frames of a read's answer, which now count as seen."""
        if not answer:
            return []
        entries = answer[0][1]
        self._last = entries[-1][0]
        frames = [fields[1] for _, fields in entries]
        self._untrimmed += sum(map(len, frames))
        return frames

    async def newest(self, connection: Connection) -> bytes:
        """Id of the last message that stands in the inbox."""
        answer = await connection.call("XREVRANGE", self._stream, "+", "-", "COUNT", 1)
        return bytes(answer[0][0]) if answer else b"0-0"

    def has_seen(self, message: bytes) -> bool:
        """Whether a message was read."""
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
        """Keep the inbox open for another ALIVE_TTL_MS."""
        PRESENT.send(connection, ignore_answer, (self._alive, self._stream), ALIVE_TTL_MS, INBOX_TTL_MS)

    async def open(self, connection: Connection) -> None:
        """Make sure replies are accepted before the first call is put."""
        _load_scripts(connection)
        await PRESENT.call(connection, (self._alive, self._stream), ALIVE_TTL_MS, INBOX_TTL_MS)

    def discard(self, connection: Connection) -> None:
        """Close for good: later replies are dropped."""
        connection.send(ignore_answer, "DEL", self._alive, self._stream)


class ReplicaQueue:
    """One deployment's queue, for a replica: read, reply, take over, beat, leave."""

    def __init__(self, keys: Keys, deployment: str, replica: str) -> None:
        self._keys = keys
        self._stream = keys.calls(deployment)
        self._heartbeats = keys.heartbeats(deployment)
        self._replicas = keys.replicas(deployment)
        self._dead_letters = keys.dead_letters(deployment)
        self._replica = replica
        self.deployment = deployment

    async def open(self, connection: Connection) -> None:
        """Make sure the group exists, from the beginning of the stream: nothing put before counts as read."""
        _load_scripts(connection)
        try:
            await connection.call("XPENDING", self._stream, GROUP)  # allowed beyond maxmemory, unlike XGROUP CREATE
        except RedisError as exc:
            if not str(exc).startswith("NOGROUP"):
                raise
            try:
                await connection.call("XGROUP", "CREATE", self._stream, GROUP, "0", "MKSTREAM")
            except RedisError as exc:
                if not str(exc).startswith("BUSYGROUP"):  # a neighbour was quicker
                    raise

    def read(self, connection: Connection, on_answer: Callable[[Answer], None], *, most: int, block_ms: int) -> None:
        """Wait for up to `most` new entries; `entries` turns the answer into entries."""
        connection.send_now(
            on_answer,
            *("XREADGROUP", "GROUP", GROUP, self._replica, "COUNT", most, "BLOCK", block_ms, "STREAMS"),
            *(self._stream, ">"),
        )

    async def history(self, connection: Connection) -> list[Entry]:
        """Every entry that Redis has given to this replica and that is not answered yet."""
        # Not XREADGROUP .. 0, which would count as another delivery.
        found: list[Entry] = []
        pending = await connection.call("XPENDING", self._stream, GROUP, "-", "+", _MOST_PENDING, self._replica)
        for entry_id, _, _, count in pending:
            raws = await connection.call("XRANGE", self._stream, entry_id, entry_id)
            found += (_entry(raw, count // 2 + 1) for raw in raws)
        return found

    @staticmethod
    def entries(answer: Answer) -> list[Entry]:
        """The entries of a read's answer."""
        if not answer:
            return []
        return [Entry(raw[0], raw[1][5]) if len(raw[1]) == 6 else _entry(raw) for raw in answer[0][1]]

    def reply(
        self,
        connection: Connection,
        caller: str,
        replies: Iterable[tuple[bytes, bytes]],
        on_answer: Callable[[Answer], None],
        *,
        insist: bool = True,
    ) -> None:
        """Answer (entry id, frame) pairs of one caller; `on_answer` gets how many were the first answer.

        Args:
            insist: Drop them if the caller seems dead; else nothing is done then, and `on_answer` gets -1.
        """
        arguments: list[bytes] = []
        for pair in replies:
            arguments += pair
        keys = (self._stream, self._keys.inbox(caller), self._keys.alive(caller))
        REPLY.send(connection, on_answer, keys, GROUP, INBOX_TTL_MS, "1" if insist else "0", *arguments)

    async def give_up(self, connection: Connection, entry: bytes, reason: str, caller: str, frame: bytes) -> bool:
        """Move an entry to the dead letters and answer its caller (none if `frame` is empty)."""
        keys = (self._stream, self._dead_letters, self._keys.inbox(caller), self._keys.alive(caller))
        arguments = (GROUP, entry, reason, DEAD_LETTERS_KEPT, frame, INBOX_TTL_MS)
        return bool(await DEAD_LETTER.call(connection, keys, *arguments))

    async def take(
        self, connection: Connection, replica: str, beat: bytes, *, most: int, unsafe_only: bool
    ) -> list[Entry]:
        """Take over entries of a replica judged gone by its heartbeat value; none if it has beaten since."""
        answer = await TAKE.call(
            connection,
            (self._stream, self._heartbeats),
            *(GROUP, replica, self._replica, most, "1" if unsafe_only else "0", beat),
        )
        return [_entry(raw, deliveries) for deliveries, raw in answer]

    async def introduce(self, connection: Connection) -> None:
        """Be known to the neighbours: they look seldom for calls of a replica whose heart they never heard."""
        names = (self._stream, self._heartbeats, self._keys.meta(self.deployment))
        await BEAT.call(connection, names, GROUP, self._replica, "0")

    async def note_start(self, connection: Connection, entry: bytes) -> bool:
        """Note that a call taken over is about to run again; False if it is not this replica's any more."""
        return bool(await START.call(connection, (self._stream,), GROUP, self._replica, entry))

    async def heartbeats(self, connection: Connection) -> dict[str, bytes]:
        """Replica id -> counter, DEAD or LEFT."""
        answer = await connection.call("HGETALL", self._heartbeats)
        return {key.decode(): value for key, value in zip(answer[::2], answer[1::2], strict=True)}

    async def adopt_orphans(self, connection: Connection) -> None:
        """Give replicas that have entries, but no heartbeat at all, one that will never move."""
        beats = await self.heartbeats(connection)
        for raw in await connection.call("XINFO", "CONSUMERS", self._stream, GROUP):
            consumer = dict(zip(raw[::2], raw[1::2], strict=True))
            if consumer[b"pending"] and consumer[b"name"].decode() not in beats:
                await connection.call("HSETNX", self._heartbeats, consumer[b"name"], 0)

    async def silent_workers(self, connection: Connection) -> list[str]:
        """Nodes (or workers without one) that have told how far they are here, and do not say that they live."""
        told = await connection.call("HKEYS", self._keys.workers(self.deployment))
        nodes = [node.decode() for node in told]
        return [node for node in nodes if not await connection.call("EXISTS", self._keys.alive(node))]

    async def forget_worker(self, connection: Connection, node: str) -> None:
        """Remove what a worker told that is gone."""
        await connection.call("HDEL", self._keys.workers(self.deployment), node)

    async def last_from_before(self, connection: Connection) -> bytes | None:
        """The last entry from before the server was restarted or replaced, None where it was not."""
        info = await connection.call("INFO", "server")
        found = re.search(rb"run_id:(\w+)", info)
        names = (self._keys.run_id, self._keys.deployments, self._keys.before)
        run_id = found[1] if found else b""
        last: bytes | None = await EPOCH.call(connection, names, run_id, self._keys.calls(""), self.deployment)
        return last

    async def retire(self, connection: Connection, replica: str) -> bool:
        """Forget a replica if nothing is pending for it."""
        return bool(await RETIRE.call(connection, (self._stream, self._heartbeats, self._replicas), GROUP, replica))


def beat(
    client: redis.Redis, keys: Keys, deployment: str, replica: str, entries: Sequence[bytes], *, serving: bool
) -> list[bytes]:
    """Say that a replica lives; with entry ids, learn which of them it no longer owns.

    For the heartbeat thread, which has its own redis-py connection.
    """
    names = (keys.calls(deployment), keys.heartbeats(deployment), keys.meta(deployment))
    lost: list[bytes] = _run(client, BEAT, names, GROUP, replica, "1" if serving else "0", *entries)
    return lost


class Demand(NamedTuple):
    """What there is to do for a deployment.

    Attributes:
        calls: Queued and running.
        waited_s: How long the first call that nobody has taken has waited.
        nodes: Ids of the live nodes that serve it, and of workers started by hand.
    """

    calls: int
    waited_s: float
    nodes: tuple[str, ...]


def measure(client: redis.Redis, keys: Keys, deployment: str) -> Demand:
    """What there is to do for a deployment, for the heartbeat thread."""
    names = (keys.calls(deployment), keys.low(deployment), keys.workers(deployment))
    calls, waited_ms, *nodes = _run(client, DEMAND, names, GROUP, keys.alive(""))
    return Demand(calls, waited_ms / 1000, tuple(sorted(node.decode() for node in nodes)))


def leave(client: redis.Redis, keys: Keys, deployment: str, replica: str, *, all_answered: bool) -> bool:
    """Take a replica out of the books; False if calls it never started wait for a neighbour to take them.

    Args:
        all_answered: Every call it started is answered for certain; else those still pending count as started.
    """
    client.hset(keys.heartbeats(deployment), replica, LEFT if all_answered else DEAD)
    client.hdel(keys.replicas(deployment), replica)
    names = (keys.calls(deployment), keys.heartbeats(deployment), keys.replicas(deployment))
    return bool(_run(client, RETIRE, names, GROUP, replica))


def control_frame(signer: Signer, to: str, control: Control, about: str = "") -> bytes:
    """A control message, ready for the inbox of `to`."""
    return signer.seal(encode(Reply(about, to, CONTROL, encode(control))))


def send_control(
    connection: Connection, keys: Keys, signer: Signer, to: str, control: Control, about: str = ""
) -> None:
    """Tell a process something, if it lives."""
    frame = control_frame(signer, to, control, about)
    TELL.send(connection, ignore_answer, (keys.inbox(to), keys.alive(to)), INBOX_TTL_MS, frame)


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
    TELL.send(connection, on_answer, (keys.inbox(to), keys.alive(to)), INBOX_TTL_MS, frame, "1")


def post_tombstone(client: redis.Redis, keys: Keys, deployment: str, replica: str, signer: Signer) -> None:
    """Make a replica's death known, so that its neighbours take over its calls at once.

    For whoever saw the process die; uses redis-py, raises its errors.
    """
    reach("tombstone")
    client.hset(keys.heartbeats(deployment), replica, DEAD)
    reach("tombstone-set")
    call_neighbours(client, keys, deployment, replica, signer)


def call_neighbours(client: redis.Redis, keys: Keys, deployment: str, replica: str, signer: Signer) -> None:
    """Ask every other replica of a deployment to look for calls to take over."""
    for field in cast("list[bytes]", client.hkeys(keys.heartbeats(deployment))):
        neighbour = field.decode()
        if neighbour != replica:
            frame = control_frame(signer, neighbour, Control("sweep"))
            _run(client, TELL, (keys.inbox(neighbour), keys.alive(neighbour)), INBOX_TTL_MS, frame)


def remaining(client: redis.Redis, stream: str) -> Iterator[tuple[bytes, dict[bytes, bytes]]]:
    """The (id, fields) of every entry of a stream, a few at a time: a million would keep Redis from all other work."""
    after = "-"
    while found := cast("list[tuple[bytes, dict[bytes, bytes]]]", client.xrange(stream, after, count=_PAGE)):
        yield from found
        after = f"({found[-1][0].decode()}"


def fail_remaining(client: redis.Redis, keys: Keys, deployment: str, signer: Signer, error: bytes) -> int:
    """Answer every call left in a deleted deployment's queue with an encoded ErrorInfo; returns how many."""
    count = 0
    for entry_id, fields in remaining(client, keys.calls(deployment)):
        if DURABLE.encode() in fields.get(b"f", b""):
            continue  # `records` knows how
        try:
            call: Call = decode_call(signer.open(fields[b"d"]))
        except (FrameRejected, msgspec.DecodeError):  # no caller can be told
            continue
        frame = signer.seal(encode(Reply(call.id, call.reply_to, ERROR, error)))
        _run(client, TELL, (keys.inbox(call.reply_to), keys.alive(call.reply_to)), INBOX_TTL_MS, frame)
        client.xdel(keys.calls(deployment), entry_id)
        count += 1
    return count


def _run(client: redis.Redis, script: Script, keys: tuple[str, ...], *arguments: Any) -> Any:
    try:
        return client.evalsha(script.sha, len(keys), *keys, *arguments)
    except redis.exceptions.NoScriptError:
        return client.eval(script.source, len(keys), *keys, *arguments)


def _load_scripts(connection: Connection) -> None:
    """Load the scripts whose order matters; one that is loaded on its first use is overtaken by what is sent next."""
    for script in (ADMIT, CLAIM, REPLY, TELL):
        connection.send(ignore_answer, "SCRIPT", "LOAD", script.source)


def order(entry: bytes) -> tuple[int, int]:
    """What entry ids are compared by."""
    ms, _, sequence = entry.partition(b"-")
    return int(ms), int(sequence)
