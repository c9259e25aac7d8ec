"""What is left of a deleted deployment: calls that nobody will run, and whose callers have to be told."""

from collections.abc import Iterator
from typing import cast

import msgspec
import redis

from qserve.broker.history.buckets import KEPT_S
from qserve.broker.inboxes import tell_now
from qserve.broker.keys import Keys
from qserve.broker.redis_errors import our_errors
from qserve.errors import FrameRejected
from qserve.wire.messages import DURABLE, ERROR, Call, Reply, Signer, decode_call, encode

_PAGE = 500


def remaining(client: redis.Redis, stream: str) -> Iterator[tuple[bytes, dict[bytes, bytes]]]:
    """The (id, fields) of every entry that a stream has now, a few at a time: a million would keep Redis from all other
    work. What comes later belongs to another deployment of that name."""
    after, newest = "-", cast("list[tuple[bytes, dict[bytes, bytes]]]", client.xrevrange(stream, count=1))
    last = newest[0][0].decode() if newest else "-"
    while found := cast("list[tuple[bytes, dict[bytes, bytes]]]", client.xrange(stream, after, last, count=_PAGE)):
        yield from found
        after = f"({found[-1][0].decode()}"


def fail_remaining(client: redis.Redis, keys: Keys, deployment: str, signer: Signer, error: bytes) -> int:
    """Answer every call left in a deleted deployment's queue with an encoded ErrorInfo; returns how many."""
    count, keys = 0, keys.of(deployment)
    for entry_id, fields in remaining(client, keys.calls(deployment)):
        if DURABLE.encode() in fields.get(b"f", b""):
            continue  # `records` knows how
        try:
            call: Call = decode_call(signer.open(fields[b"d"]))
        except (FrameRejected, msgspec.DecodeError):  # no caller can be told
            continue
        frame = signer.seal(encode(Reply(call.id, call.reply_to, ERROR, error)))
        tell_now(client, keys, call.reply_to, frame)
        client.xdel(keys.calls(deployment), entry_id)
        count += 1
    return count


def forget_remains(client: redis.Redis, keys: Keys, deployment: str) -> None:
    """Remove the queue of a deleted deployment, what its replicas and workers reported, and its totals.

    The calls that had trouble can be looked at for as long as the counts of those days.
    """
    names = (keys.replicas, keys.heartbeats, keys.workers, keys.calls, keys.totals)
    with our_errors(client):
        client.delete(*(name(deployment) for name in names))
        client.pexpire(keys.troubles(deployment), KEPT_S * 1000)  # EXPIRE is not among the rights of a deployer
