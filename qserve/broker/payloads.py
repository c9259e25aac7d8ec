"""Payloads that are too large for a queue: sealed, put under a key of their own, and opened again.

Every large payload, of a call or of a result, goes through here, and all of them obey QSERVE_OUT_OF_LINE_BYTES.
"""

from typing import Any, cast

import redis

from qserve.broker.connection import Connection, ignore_answer
from qserve.broker.counters import count
from qserve.broker.keys import Keys
from qserve.broker.redis_errors import our_errors
from qserve.errors import FrameRejected, PayloadTooLarge
from qserve.wire.messages import Blob, Signer, decode_blob, encode

LARGEST_STORED = 512 * 2**20 - 1024
"""What Redis keeps under one key."""
_UNCONFIRMED_MS = 60_000
"""How long a payload of a durable call is kept until the call is submitted, or has ended; then as long as the call."""


def result_id(call_id: str) -> str:
    """The id of a call's result that travels out of line, in its key and in its Blob."""
    return f"{call_id}:r"


class Payloads:
    """Seals, stores and opens the large payloads of one namespace.

    A payload is sealed together with its id (the id of its call, or `result_id` of that), so that no other payload
    can be put in its place.

    Args:
        limit: Bytes that a queue or an inbox may carry; a payload above this size travels out of line.

    Attributes:
        limit: The same, for those on the path of a call who spare themselves the call of `seal`.
    """

    def __init__(self, keys: Keys, signer: Signer, limit: int) -> None:
        self._keys = keys
        self._signer = signer
        self.limit = limit

    def seal(self, payload_id: str, payload: bytes) -> bytes | None:
        """The sealed payload if it has to travel out of line; None if it is small enough to travel with its message.

        Raises:
            PayloadTooLarge: It is larger than what Redis keeps under one key.
        """
        if len(payload) <= self.limit:
            return None
        if len(payload) > LARGEST_STORED:
            raise PayloadTooLarge(
                f"the value takes {len(payload):,} bytes when packed, and Redis keeps no more than {LARGEST_STORED:,} "
                "under one key: send it without `durable=True`, or put it somewhere else and send where it is"
            )
        return self._signer.seal(encode(Blob(payload_id, payload)))

    def seal_result(self, call_id: str, payload: bytes) -> bytes | None:
        """Like `seal`, for the result of a call."""
        if len(payload) <= self.limit:
            return None
        return self._signer.seal(encode(Blob(result_id(call_id), payload)))

    def open(self, payload_id: str, sealed: bytes) -> bytes:
        """The payload that `seal` has sealed.

        Raises:
            FrameRejected: No accepted key signed it, or it is the payload of another call.
        """
        blob: Blob = decode_blob(self._signer.open(sealed))
        if blob.id != payload_id:
            raise FrameRejected("the payload of another call")
        return blob.data

    # On the connection of a call

    def put_result(self, connection: Connection, call_id: str, sealed: bytes, *, by: str) -> None:
        """Store the sealed result of a durable call before its end is sent; settle_call.lua makes it last.

        Args:
            by: Who stores it. Others may store theirs, and that of the first who is done is the result.
        """
        name = self._keys.payload(f"{result_id(call_id)}:{by}")
        connection.send(ignore_answer, "SET", name, sealed, "PX", _UNCONFIRMED_MS)
        count(connection, self._keys, "values_stored")

    def put_unconfirmed(self, connection: Connection, payload_id: str, sealed: bytes) -> None:
        """Store the sealed payload of a durable call before it is submitted; submit.lua makes it last.

        One that is there already stays as it is: it may belong to an earlier submission that has been accepted.
        """
        connection.send(ignore_answer, *self._unconfirmed(payload_id, sealed))
        count(connection, self._keys, "values_stored")

    async def store_unconfirmed(self, connection: Connection, payload_id: str, sealed: bytes) -> None:
        """Like `put_unconfirmed`, and waits until it is there. Raises like `Connection.call`."""
        await connection.call(*self._unconfirmed(payload_id, sealed))
        count(connection, self._keys, "values_stored")

    async def fetch(self, connection: Connection, payload_id: str) -> bytes | None:
        """The opened payload, which stays where it is; None if it is gone. Raises like `open` and `Connection.call`."""
        sealed = await connection.call("GET", self._keys.payload(payload_id))
        return None if sealed is None else self.open(payload_id, sealed)

    async def take(self, connection: Connection, payload_id: str) -> bytes | None:
        """Like `fetch`, and deletes the payload."""
        sealed = await connection.call("GETDEL", self._keys.payload(payload_id))
        return None if sealed is None else self.open(payload_id, sealed)

    def drop(self, connection: Connection, payload_id: str) -> None:
        """Delete a payload that nobody needs any more."""
        connection.send(ignore_answer, "DEL", self._keys.payload(payload_id))

    # Over redis-py, for what is not on the path of a call

    def put_unconfirmed_now(self, client: redis.Redis, payload_id: str, sealed: bytes) -> None:
        """Like `put_unconfirmed`."""
        with our_errors(client):
            client.set(self._keys.payload(payload_id), sealed, px=_UNCONFIRMED_MS, nx=True)

    def fetch_now(self, client: redis.Redis, payload_id: str) -> bytes | None:
        """Like `fetch`."""
        with our_errors(client):
            sealed = cast("bytes | None", client.get(self._keys.payload(payload_id)))
        return None if sealed is None else self.open(payload_id, sealed)

    def _unconfirmed(self, payload_id: str, sealed: bytes) -> tuple[Any, ...]:
        return "SET", self._keys.payload(payload_id), sealed, "PX", _UNCONFIRMED_MS, "NX"
