"""The records of durable calls, as callers and replicas write and read them."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import redis

from qserve.broker.connection import Answer, Connection, ignore_answer
from qserve.broker.dead_letter_streams import DEAD_LETTERS_KEPT
from qserve.broker.inboxes import INBOX_TTL_MS, control_frame, tell_now
from qserve.broker.instance.remains import remaining
from qserve.broker.keys import GROUP, Keys
from qserve.broker.payloads import Payloads
from qserve.broker.redis_errors import our_errors
from qserve.broker.refusals import NO_PAYLOAD, payload_refused, queue_full, refusal_of_all
from qserve.broker.replica_queue import Entry
from qserve.broker.scripts import (
    ATTACH,
    DESCRIBE,
    DUE,
    END_CALL,
    NOTE_CHILD,
    NOTE_PART,
    NOTE_PROGRESS,
    REJECT_CALL,
    RUN_CALL,
    SETTLE_CALL,
    SUBMIT,
    load_scripts,
)
from qserve.wire.call_record import (
    ANYONE,
    CANCELLED,
    DEAD_TTL_S,
    FAILED,
    IDEMPOTENCY_TTL_S,
    RESULT_TTL_S,
    CallRecord,
    DurableCall,
    DurableOptions,
    parse_record,
)
from qserve.wire.messages import DURABLE, ERROR, Control, Reply, Signer, encode, encode_bare

POSITIONS_COUNTED = 100
"""Beyond this a call's place in its queue is not counted: that would mean to read what is before it."""
_MOVED_AT_ONCE = 256
_IDEMPOTENCY_TTL_MS = int(IDEMPOTENCY_TTL_S * 1000)
_LONGEST_ERROR = 2000


def durable_reply(signer: Signer, call_id: str, kind: int, payload: bytes, *, out_of_line: bool = False) -> bytes:
    """A reply to whoever asks for the call by its id."""
    return signer.seal(encode(Reply(call_id, ANYONE, kind, payload, out_of_line)))


NO_STATE = -4
"""What submit.lua says where nothing is deployed at all."""


class Records:
    """The records of one namespace, over a connection."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def open(self, connection: Connection) -> None:
        """Load the scripts whose order matters."""
        load_scripts(connection, (SUBMIT, ATTACH, END_CALL, RUN_CALL, SETTLE_CALL, NOTE_PROGRESS))

    def submit(
        self,
        connection: Connection,
        deployment: str,
        calls: Sequence[tuple[DurableCall, bytes, DurableOptions]],
        waiter: str,
        on_answer: Callable[[Answer], None],
    ) -> None:
        """Put (call, its sealed frame, options); `on_answer` gets what submit.lua returns."""
        SUBMIT.send(connection, on_answer, *submit_arguments(self._keys, deployment, calls, waiter))

    def note_child(self, connection: Connection, parent: str, call_id: str) -> None:
        """Note that a call has made another one, which lies in another shard."""
        NOTE_CHILD.send(connection, ignore_answer, (self._keys.call(parent),), call_id)

    def attach(self, connection: Connection, call_id: str, waiter: str, on_answer: Callable[[Answer], None]) -> None:
        """Ask for the outcome, and be told of it if there is none yet; `on_answer` gets what attach.lua returns."""
        ATTACH.send(connection, on_answer, self._keys.whole(self._keys.call(call_id)), self._keys.base, waiter)

    def end(
        self, connection: Connection, call_id: str, state: str, frame: bytes, on_answer: Callable[[Answer], None]
    ) -> None:
        """Cancel a call or let it expire; `on_answer` gets what end_call.lua returns."""
        ttl_ms = int(RESULT_TTL_S * 1000)
        arguments = (self._keys.base, call_id, GROUP, state, frame, ttl_ms, INBOX_TTL_MS)
        END_CALL.send(connection, on_answer, self._keys.whole(self._keys.call(call_id)), *arguments)

    async def describe(self, connection: Connection, call_id: str, after_event: int = 0) -> CallRecord | None:
        """The record as it is now, with its events after that number; None if there is none (any more)."""
        arguments = (self._keys.base, POSITIONS_COUNTED, after_event, GROUP)
        return parse_record(call_id, await DESCRIBE.call(connection, (self._keys.call(call_id),), *arguments))

    # For replicas

    async def run(self, connection: Connection, call: DurableCall, replica: str, entry: bytes) -> list[Any]:
        """Note that a call is about to run; returns what run_call.lua returns."""
        names = self._keys.whole(self._keys.calls(call.deployment), self._keys.call(call.id), self._keys.parts(call.id))
        answer: list[Any] = await RUN_CALL.call(connection, names, GROUP, replica, entry)
        return answer

    def settle(
        self,
        connection: Connection,
        call: DurableCall,
        entry: bytes,
        *,
        state: str,
        frame: bytes,
        stored_by: str,
        attempt: int | None,
        keep_ms: int,
        error: str,
        celery: bytes,
        on_answer: Callable[[Answer], None],
    ) -> None:
        """Write the end of a call, or of an attempt; `on_answer` gets 1 if this was the first answer.

        Args:
            stored_by: Who has sent its result to be stored apart before, by `put_result`; "" if it is not large.
            attempt: Which one has ended; None where that does not matter.
            celery: What Celery's result backend is told, b"" if it is not.
        """
        keys = self._keys
        names = keys.whole(keys.calls(call.deployment), keys.dead_letters(call.deployment), keys.due(call.deployment))
        said = error[:_LONGEST_ERROR]
        SETTLE_CALL.send(
            *(connection, on_answer, names, keys.base, GROUP, entry, call.id, state, frame, keep_ms, INBOX_TTL_MS),
            *(said, DEAD_LETTERS_KEPT, said, celery, stored_by, "" if attempt is None else attempt),
        )

    async def reject(self, connection: Connection, deployment: str, entry: Entry, reason: str, frame: bytes) -> None:
        """Put an entry that is no call of ours among the dead letters; the record whose entry it is ends as dead."""
        keys, call_id = self._keys, entry.call.decode(errors="replace")
        names = keys.whole(keys.calls(deployment), keys.dead_letters(deployment), keys.call(call_id))
        arguments = (keys.base, GROUP, entry.id, call_id, frame, int(DEAD_TTL_S * 1000), INBOX_TTL_MS)
        await REJECT_CALL.call(connection, names, *arguments, reason[:_LONGEST_ERROR], DEAD_LETTERS_KEPT)

    def progress(
        self,
        connection: Connection,
        call_id: str,
        entry: bytes,
        attempt: int,
        frame: bytes,
        on_answer: Callable[[Answer], None],
    ) -> None:
        """Tell how far a running call has come."""
        keys = self._keys
        names = keys.whole(keys.call(call_id))
        NOTE_PROGRESS.send(connection, on_answer, names, keys.base, entry, frame, INBOX_TTL_MS, attempt)

    async def part(
        self, connection: Connection, call_id: str, entry: bytes, attempt: int, index: int, frame: bytes, news: bytes
    ) -> None:
        """Record a part that a running call gives; twice is harmless."""
        names = self._keys.whole(self._keys.call(call_id), self._keys.parts(call_id))
        told = (self._keys.base, entry, index, frame, news, INBOX_TTL_MS, attempt)
        await NOTE_PART.call(connection, names, *told)

    async def parts(
        self, connection: Connection, record: CallRecord, after: int, most: int
    ) -> list[tuple[int, float, bytes]]:
        """(number, Unix time, frame) of the parts that the record's last attempt has given after that number."""
        first, last = f"{record.attempts}-{after + 1}", f"{record.attempts}-{record.last_number}"
        answer = await connection.call("XRANGE", self._keys.parts(record.id), first, last, "COUNT", most)
        return [(int(entry.split(b"-")[1]), int(fields[3]) / 1000, fields[1]) for entry, fields in answer]

    async def move_due(
        self, connection: Connection, deployment: str, replica: str, *, lease_s: float, anyway: bool
    ) -> list[Any]:
        """Put calls on the queue that are due; returns what due.lua returns."""
        keys = self._keys
        names = keys.whole(keys.due(deployment), keys.calls(deployment), keys.mover(deployment), keys.low(deployment))
        arguments = (keys.base, replica, int(1000 * lease_s), _MOVED_AT_ONCE, "1" if anyway else "0", GROUP)
        answer: list[Any] = await DUE.call(connection, names, *arguments)
        return answer


def fail_remaining_records(client: redis.Redis, keys: Keys, deployment: str, signer: Signer, error: bytes) -> None:
    """End every durable call that waits for a deleted deployment with an encoded ErrorInfo."""
    keys = keys.of(deployment)
    waiting = [*client.zrange(keys.due(deployment), 0, -1), *client.zrange(keys.low(deployment), 0, -1)]
    queued = [
        (entry, fields.get(b"r", b""))
        for entry, fields in remaining(client, keys.calls(deployment))
        if DURABLE.encode() in fields.get(b"f", b"")
    ]
    for entry, each in [*((None, each) for each in waiting), *queued]:
        call_id = bytes(each).decode(errors="replace")
        frame = durable_reply(signer, call_id, ERROR, error)
        arguments = (keys.base, call_id, GROUP, FAILED, frame, int(RESULT_TTL_S * 1000), INBOX_TTL_MS)
        END_CALL.run(client, keys.whole(keys.call(call_id)), *arguments)
        if entry is not None:  # one that no record knows of, or any more; not before: else nobody would find its call
            client.xdel(keys.calls(deployment), entry)


def end_now(client: redis.Redis, keys: Keys, signer: Signer, call_id: str, error: bytes) -> str:
    """Cancel a durable call: "unknown", "ended" before, "cancelled", or "cancelling" where it runs.

    Args:
        error: Encoded ErrorInfo for those who wait.

    Raises:
        BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be told.
    """
    frame, keys = durable_reply(signer, call_id, ERROR, error), keys.of_call(call_id)
    arguments = (keys.base, call_id, GROUP, CANCELLED, frame, int(RESULT_TTL_S * 1000), INBOX_TTL_MS)
    with our_errors(client):
        answer = END_CALL.run(client, keys.whole(keys.call(call_id)), *arguments)
        if isinstance(answer, list):
            replica, entry, _ = (part.decode() for part in answer)
            tell_now(client, keys, replica, control_frame(signer, replica, Control("cancel", entry), call_id))
            return "cancelling"
    said = bytes(answer).decode()
    return {"done": "cancelled", "later": "cancelling"}.get(said, said)


def submit_now(
    client: redis.Redis, keys: Keys, signer: Signer, payloads: Payloads, call: DurableCall, options: DurableOptions
) -> None:
    """Submit one durable call that nobody here waits for.

    Raises:
        DeploymentNotFound, DeploymentUnavailable, BackPressureError: The call was not taken.
        BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be told of it, or has no room for it.
    """
    sealed = payloads.seal(call.id, call.payload)
    with our_errors(client):
        if sealed is not None:
            payloads.put_unconfirmed_now(client, call.id, sealed)
            call = msgspec.structs.replace(call, payload=b"", out_of_line=True)
        frame = signer.seal(encode_bare(call))
        names, *arguments = submit_arguments(keys, call.deployment, [(call, frame, options)], "")
        answer = SUBMIT.run(client, names, *arguments)
    if (error := refusal_of_all(call.deployment, answer)) is not None:
        raise error
    if answer[1] is None:
        raise queue_full(call.deployment, answer[0])
    if answer[1] == NO_PAYLOAD:
        raise payload_refused()


def submit_arguments(
    keys: Keys, deployment: str, calls: Sequence[tuple[DurableCall, bytes, DurableOptions]], waiter: str
) -> tuple[Any, ...]:
    """Keys and arguments of SUBMIT for (call, its sealed frame, options)."""
    arguments: list[str | bytes | int] = []
    keys = keys.of(deployment)
    for call, frame, options in calls:
        terms = call.terms
        arguments += (call.id, frame, int(options.delay_s * 1000), int((options.expires_s or 0) * 1000))
        arguments += (call.kind, call.method, waiter, "b" if options.low_priority else "")
        arguments += (options.idempotency, options.body_hash, _IDEMPOTENCY_TTL_MS)
        arguments += ("" if terms.result_ttl_s == RESULT_TTL_S else int(terms.result_ttl_s * 1000), terms.celery_id)
        arguments += (options.key, options.parent, "1" if call.out_of_line else "")
    queues = (keys.calls(deployment), keys.meta(deployment), keys.due(deployment), keys.low(deployment))
    names = keys.whole(*queues, keys.instance)
    return names, keys.base, deployment, *arguments
