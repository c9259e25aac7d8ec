"""The queue of a deployment, as its replicas see it."""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from qserve.broker.connection import Answer, Connection, ignore_answer
from qserve.broker.dead_letter_streams import DEAD_LETTERS_KEPT
from qserve.broker.inboxes import INBOX_TTL_MS
from qserve.broker.instance.reports import decode_infos
from qserve.broker.keys import GROUP, Keys
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.scripts import (
    ADMIT,
    ADOPT,
    BEAT,
    CANCEL,
    CLAIM,
    EPOCH,
    GIVE_UP,
    REPLY,
    RETIRE,
    START_AGAIN,
    TAKE,
    TELL,
    load_scripts,
)
from qserve.wire.messages import DURABLE
from qserve.wire.spec import ReplicaInfo

_MOST_PENDING = 10_000
_CALLERS_KNOWN = 64
"""Of how many callers the names of keys are kept."""


class Entry(NamedTuple):
    """A call's entry as Redis delivers it.

    Attributes:
        frame: The sealed Call.
        deliveries: Which start of the call comes next; from 2 on a replica has died that may have run it.
        durable: There is a record of the call, which gets its answer.
        call: Id of a durable call, as the entry says it.
        cause: What was wrong with the replica that died while it had the call; "" if that is not known.
    """

    id: bytes
    frame: bytes
    deliveries: int = 1
    durable: bool = False
    call: bytes = b""
    cause: str = ""

    @property
    def time_ms(self) -> int:
        """When the entry was put, in ms on Redis' clock."""
        return int(self.id.split(b"-", 1)[0])


def _entry(raw: Sequence[Any], deliveries: int = 1) -> Entry:
    fields = dict(zip(raw[1][::2], raw[1][1::2], strict=True))
    durable = DURABLE.encode() in fields.get(b"f", b"")
    return Entry(raw[0], fields.get(b"d", b""), deliveries, durable, fields.get(b"r", b"") if durable else b"")


class ReplicaQueue:
    """One deployment's queue, for a replica, which reads calls from it, answers them and takes over those of others."""

    def __init__(self, keys: Keys, deployment: str, replica: str) -> None:
        self._keys = keys
        self._stream = keys.calls(deployment)
        self._heartbeats = keys.heartbeats(deployment)
        self._replicas = keys.replicas(deployment)
        self._models = keys.models(deployment)
        self._dead_letters = keys.dead_letters(deployment)
        self._replica = self.replica = replica
        self._keys_of = lru_cache(_CALLERS_KNOWN)(self._reply_keys)
        self.deployment = deployment

    def _reply_keys(self, caller: str) -> tuple[str, str, str]:
        return self._stream, self._keys.inbox(caller), self._keys.alive(caller)

    async def open(self, connection: Connection) -> None:
        """Make sure the group exists, from the beginning of the stream: nothing put before counts as read."""
        load_scripts(connection, (ADMIT, CLAIM, REPLY, TELL))
        try:
            await connection.call("XPENDING", self._stream, GROUP)  # allowed beyond maxmemory, unlike XGROUP CREATE
        except CommandRefused as exc:
            if not str(exc).startswith("NOGROUP"):
                raise
            try:
                await connection.call("XGROUP", "CREATE", self._stream, GROUP, "0", "MKSTREAM")
            except CommandRefused as exc:
                if not str(exc).startswith("BUSYGROUP"):  # a neighbour was quicker
                    raise

    def read(self, connection: Connection, on_answer: Callable[[Answer], None], *, most: int, block_ms: int) -> None:
        """Wait for up to `most` new entries; `entries` turns the answer into entries."""
        connection.send_now(
            on_answer,
            *("XREADGROUP", "GROUP", GROUP, self._replica, "COUNT", most, "BLOCK", block_ms, "STREAMS"),
            *(self._stream, ">"),
        )

    async def reader_id(self, connection: Connection) -> int:
        """What `end_read` wants to know of the connection that reads."""
        return int(await connection.call("CLIENT", "ID"))

    def end_read(self, connection: Connection, reader: int) -> None:
        """Let the read of another connection end now, with what there is."""
        connection.send_now(ignore_answer, "CLIENT", "UNBLOCK", reader)

    async def length(self, connection: Connection) -> int:
        """How many calls are queued or run."""
        return int(await connection.call("XLEN", self._stream))

    async def history(self, connection: Connection) -> list[Entry]:
        """Every entry that Redis has given to this replica and that is not answered yet."""
        # Not XREADGROUP .. 0, which would count as another delivery.
        found: list[Entry] = []
        pending = await connection.call("XPENDING", self._stream, GROUP, "-", "+", _MOST_PENDING, self._replica)
        for entry_id, _, _, count in pending:
            if count == 0 and not await self.note_start(connection, entry_id):
                continue
            raws = await connection.call("XRANGE", self._stream, entry_id, entry_id)
            found += (_entry(raw, count // 2 + 1) for raw in raws)
        return found

    async def unread(self, connection: Connection, most: int) -> list[Entry]:
        """The first calls that no replica has been given yet."""
        groups = await connection.call("XINFO", "GROUPS", self._stream)
        if not groups:
            return []
        last = dict(zip(groups[0][::2], groups[0][1::2], strict=True))[b"last-delivered-id"]
        return [_entry(raw) for raw in await connection.call("XRANGE", self._stream, b"(" + last, "+", "COUNT", most)]

    def withdraw(self, connection: Connection, entry: bytes, on_answer: Callable[[Answer], None]) -> None:
        """Delete a call that no replica has been given; `on_answer` gets 1 if that was so."""
        CANCEL.send(connection, on_answer, (self._stream,), GROUP, entry)

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
        again_on: Connection | None = None,
    ) -> None:
        """Answer (entry id, frame) pairs of one caller; `on_answer` gets how many were the first answer.

        Args:
            insist: Drop them if the caller seems dead; else nothing is done then, and `on_answer` gets -1.
            again_on: As for `Script.send`.
        """
        arguments: list[bytes] = []
        for pair in replies:
            arguments += pair
        keys = self._keys_of(caller)
        told = "1" if insist else "0"
        REPLY.send(connection, on_answer, keys, GROUP, INBOX_TTL_MS, told, *arguments, again_on=again_on)

    async def give_up(self, connection: Connection, entry: bytes, reason: str, caller: str, frame: bytes) -> bool:
        """Move an entry to the dead letters and answer its caller (none if `frame` is empty)."""
        keys = (self._stream, self._dead_letters, self._keys.inbox(caller), self._keys.alive(caller))
        arguments = (GROUP, entry, reason, DEAD_LETTERS_KEPT, frame, INBOX_TTL_MS)
        return bool(await GIVE_UP.call(connection, keys, *arguments))

    async def take(self, connection: Connection, replica: str, beat: bytes, *, most: int, up_to: int) -> list[Entry]:
        """Take over entries of a replica judged gone by its heartbeat value; none if it has beaten since.

        Args:
            up_to: Of calls that may run again, take those of which at most this start comes next. Calls that nobody
                may run again are taken in any case.
        """
        answer = await TAKE.call(
            connection,
            (self._stream, self._heartbeats),
            *(GROUP, replica, self._replica, most, up_to, beat),
        )
        return [_entry(raw, deliveries) for deliveries, raw in answer]

    async def problem_of(self, connection: Connection, replica: str) -> str:
        """What was wrong with a replica before it died, as far as it could tell."""
        body = await connection.call("HGET", self._replicas, replica)
        infos = decode_infos({replica.encode(): body} if body else {}, ReplicaInfo)
        return "".join(info.problem for _, info in infos)

    async def introduce(self, connection: Connection) -> None:
        """Beat once, so that the neighbours know of this replica; for calls of one that never beat they look seldom."""
        names = (self._stream, self._heartbeats, self._keys.meta(self.deployment))
        await BEAT.call(connection, names, GROUP, self._replica, "0")

    async def note_start(self, connection: Connection, entry: bytes) -> bool:
        """Note that a call taken over is about to run again; False if it is not this replica's any more."""
        return bool(await START_AGAIN.call(connection, (self._stream,), GROUP, self._replica, entry))

    async def adopt(self, connection: Connection, entry: bytes) -> Entry | None:
        """Note that a call which was handed over is about to run; None if it is not this replica's any more."""
        raw = await ADOPT.call(connection, (self._stream,), GROUP, self._replica, entry)
        return _entry(raw) if raw else None

    async def heartbeats(self, connection: Connection) -> dict[str, bytes]:
        """The heartbeat of every replica by its id: a counter, DIED or LEFT."""
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
        """The nodes (or workers without one) that have reported on this deployment and no longer say that they live."""
        told = await connection.call("HKEYS", self._keys.workers(self.deployment))
        nodes = [node.decode() for node in told]
        return [node for node in nodes if not await connection.call("EXISTS", self._keys.alive(node))]

    async def forget_worker(self, connection: Connection, node: str) -> None:
        """Remove the report of a worker that is gone."""
        await connection.call("HDEL", self._keys.workers(self.deployment), node)

    async def last_from_before(self, connection: Connection) -> bytes | None:
        """The last entry from before the server was restarted or replaced, None where it was not."""
        info = await connection.call("INFO", "server")
        found = re.search(rb"run_id:(\w+)", info)
        names = (self._keys.run_id, self._keys.deployments, self._keys.before)
        run_id = found[1] if found else b""
        last: bytes | None = await EPOCH.call(connection, names, run_id, f"{self._keys.base}q:", self.deployment)
        return last

    async def retire(self, connection: Connection, replica: str) -> bool:
        """Forget a replica if nothing is pending for it."""
        names = (self._stream, self._heartbeats, self._replicas, self._models)
        return bool(await RETIRE.call(connection, names, GROUP, replica))
