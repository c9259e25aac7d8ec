"""The channels of calls that a process makes: what is streamed to it, and what it streams to replicas."""

from collections.abc import Callable
from functools import partial

from qserve.broker.connection import Answer
from qserve.broker.inboxes import send_chunk
from qserve.broker.keys import Keys
from qserve.broker.link import Link
from qserve.calls.deadlines import Deadlines
from qserve.calls.pending import PendingCall, PendingCalls
from qserve.errors import StreamBroken
from qserve.failpoints import reach
from qserve.wire.channel import ABORT, CREDIT, Channel, Chunk
from qserve.wire.messages import Signer


class CallChannels:
    """The channels of one process' calls. Belongs to the event loop of its client.

    Args:
        me: Id of this process.
    """

    def __init__(
        self, me: str, keys: Keys, signer: Signer, link: Link, pending: PendingCalls, deadlines: Deadlines
    ) -> None:
        self._me = me
        self._keys = keys
        self._signer = signer
        self._link = link
        self._pending = pending
        self._deadlines = deadlines
        self.on_other: Callable[[str, Chunk], bool] | None = None
        """Gets chunks of calls that this process has not made; returns whether it has taken them."""

    def open(self, call: PendingCall) -> Channel:
        """Prepare a call for traffic beside its reply."""
        channel = call.channel = Channel(self._me, partial(self._send, call.id, call))
        if call.on_stream is not None:
            channel.on_data = partial(call.on_stream, call, channel)
        return channel

    def take(self, call_id: str, chunk: Chunk) -> None:
        """Hand a chunk that has arrived to the call it belongs to."""
        call = self._pending.get(call_id)
        if call is not None and call.channel is None and call.on_stream is not None:
            self.open(call)
        if call is not None and call.channel is not None:
            reach("chunk-arrived")
            self._deadlines.put_off(call, chunk)
            call.channel.feed(chunk)
        elif self.on_other is not None and self.on_other(call_id, chunk):
            return
        elif chunk.kind not in (ABORT, CREDIT):  # nobody listens any more
            self._send(call_id, None, chunk.sender, Chunk(self._me, ABORT, 0, b"the caller has left"))

    def _send(self, call_id: str, call: PendingCall | None, to: str, chunk: Chunk) -> None:
        def check(answer: Answer) -> None:
            channel = call.channel if call is not None else None
            if channel is not None and channel.peer_has_left(answer):
                channel.close(StreamBroken("the stream broke off, its replica is gone: call again for all of it"))

        if self._link.sender.is_open:
            send_chunk(self._link.sender, self._keys, self._signer, to, call_id, chunk, check)
        elif call is not None and call.channel is not None:
            call.channel.close(StreamBroken("the stream broke off, Redis cannot be reached: call again when it can"))
