"""How a replica's answers leave it: in batches, each kept until Redis has confirmed it."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from qserve.broker.connection import Answer, Connection
from qserve.broker.counters import count
from qserve.broker.large.lending import Lending, Loan
from qserve.broker.link import Link
from qserve.broker.redis_errors import CommandRefused, StillMoving
from qserve.broker.replica_queue import Entry, ReplicaQueue
from qserve.errors import BrokerUnavailable, PayloadTooLarge, ResultTooLarge
from qserve.failpoints import reach
from qserve.settings import Settings
from qserve.wire.channel import DOUBT_S
from qserve.wire.messages import ERROR, Call, Reply, Signer, encode
from qserve.wire.parts import Payload

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 1.0
_ASK_AGAIN_S = (0.2, 2.0)
"""How soon to see whether a caller that seemed dead has spoken, first and later; a server that has lost everything
knows nobody until they come back."""


class _Batch(NamedTuple):
    caller: str
    replies: list[tuple[bytes, bytes]]
    doubted_s: float = 0.0


class Answers:
    """The answers of one replica. Belongs to its event loop.

    All answers of one event-loop tick to one caller leave as one script, in the write of the next read where there is
    one: that spares replica and server a write and a read for each. An answer whose confirmation is lost with the
    connection is sent again: REPLY takes only the first one for an entry, so this is no blind repetition, and the call
    behind it never runs again for want of an answer.

    Args:
        before_sending: Called at the end of a tick, before what is left is sent: a read begun there takes it along.
    """

    def __init__(
        self,
        settings: Settings,
        signer: Signer,
        queue: ReplicaQueue,
        link: Link,
        lending: Lending,
        before_sending: Callable[[], None],
    ) -> None:
        self._before_sending = before_sending
        self._tick_ends = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._keys = settings.keys
        self._signer = signer
        self.lending = lending
        self.largest_frame = settings.out_of_line_bytes
        self._queue = queue
        self._link = link
        self._collected: dict[str, list[tuple[bytes, bytes]]] = {}
        self._sent: dict[int, _Batch] = {}
        self._batches = 0
        self._insists = False

    def add(self, entry: bytes, call: Call, kind: int, payload: Payload | Loan) -> None:
        """Answer a call at the end of this tick."""
        is_large = len(payload) > self.largest_frame
        if is_large:
            loan = payload if isinstance(payload, Loan) else self.lending.lend_result(payload)
            payload = loan.frame
        frame = self._signer.seal(encode(Reply(call.id, call.reply_to, kind, payload, is_large)))  # type: ignore[arg-type]
        replies = self._collected.get(call.reply_to)
        if replies is not None:
            replies.append((entry, frame))
            return
        if not self._collected:
            self.at_end_of_tick()
        self._collected[call.reply_to] = [(entry, frame)]

    async def prepared(self, payload: Payload) -> Payload | Loan:
        """A result that is ready to be sent: a large one is copied to where its caller can read it.

        Raises:
            ResultTooLarge: There is not so much memory.
        """
        if len(payload) <= self.largest_frame:
            return payload
        try:
            return await self.lending.aside(partial(self.lending.lend_result, payload), len(payload))
        except PayloadTooLarge as exc:
            raise ResultTooLarge(str(exc)) from exc

    def at_end_of_tick(self) -> None:
        """Read on, and send what is collected, once everything that is ready to run now has run."""
        if not self._tick_ends:
            self._tick_ends = True
            loop = self._loop = self._loop or asyncio.get_running_loop()
            loop.call_soon(self._end_tick)

    def _end_tick(self) -> None:
        self._tick_ends = False
        try:
            self._before_sending()
        finally:
            self.flush()

    def flush(self) -> None:
        """Send what was collected; kept while Redis is away."""
        sender = self._link.sender
        if self.put_on(sender):
            sender.flush()
            self.were_sent()

    def put_on(self, connection: Connection) -> bool:
        """Give what was collected to a connection, which is flushed next; False where there is nothing to send."""
        if not self._collected or not self._link.sender.is_open:
            return False
        reach("reply")
        collected, self._collected = self._collected, {}
        for caller, replies in collected.items():
            self._batches += 1
            self._send(self._batches, _Batch(caller, replies), connection, is_first=True)
        return True

    @staticmethod
    def were_sent() -> None:
        """They are on their way."""
        reach("reply-sent")

    def resend(self) -> None:
        """Send again, on a new connection, what the last one did not confirm."""
        for number, batch in list(self._sent.items()):
            self._send(number, batch, self._link.sender, is_first=False)
        self.flush()

    def has(self, entry: bytes) -> bool:
        """Whether an entry is answered, but not yet confirmed to be."""
        batches = [*self._collected.values(), *(batch.replies for batch in self._sent.values())]
        return any(entry == answered for replies in batches for answered, _ in replies)

    def insist(self) -> None:
        """There is no time left: answers to callers that seem dead are dropped."""
        self._insists = True
        for number, batch in list(self._sent.items()):
            self._send(number, batch, self._link.sender, is_first=False)

    @property
    def unconfirmed(self) -> bool:
        """Whether an answer may not have arrived."""
        return bool(self._collected or self._sent)

    async def reject(self, entry: Entry, error: Exception, call: Call | None = None, told: bytes = b"") -> None:
        """Put what is no call of ours among the dead letters.

        Args:
            call: The call whose contents are wrong, if it is one; else there is no caller to trust.
            told: Encoded ErrorInfo for its caller.
        """
        self.note_rejected(error)
        await self._give_up(entry, f"rejected: {error}", call, told)

    def note_rejected(self, error: Exception) -> None:
        """Log and count what is no message of ours."""
        logger.warning("rejected a frame in the queue of %s: %s", self._queue.deployment, error)
        count(self._link.sender, self._keys, "rejected_frames")

    async def bury(self, entry: Entry, call: Call, reason: str, error: bytes) -> None:
        """Put a call among the dead letters and answer its caller with an encoded ErrorInfo."""
        logger.error("gave up on call %s: %s", call.id, reason)
        count(self._link.sender, self._keys, "dead_letters")
        await self._give_up(entry, reason, call, error)

    async def _give_up(self, entry: Entry, reason: str, call: Call | None, error: bytes) -> None:
        if not self._link.sender.is_open:
            return  # still pending for this replica: the next link finds it
        caller, frame = "", b""
        if call is not None:
            caller, frame = call.reply_to, self._signer.seal(encode(Reply(call.id, call.reply_to, ERROR, error)))
        reach("bury")
        try:
            await self._queue.give_up(self._link.sender, entry.id, reason, caller, frame)
            reach("buried")
        except BrokerUnavailable as exc:
            logger.debug("could not give up entry %s: %s", entry.id, exc)

    def _send(
        self, number: int, batch: _Batch, connection: Connection, *, is_first: bool, insist: bool = False
    ) -> None:
        sender = self._link.sender
        if not sender.is_open:
            return
        self._sent[number] = batch
        on_answer, insist = partial(self._confirmed, number, is_first), insist or self._insists
        self._queue.reply(connection, batch.caller, batch.replies, on_answer, insist=insist, again_on=sender)

    def _confirmed(self, number: int, is_first: bool, answer: Answer) -> None:
        if isinstance(answer, (CommandRefused, StillMoving)):
            logger.error("Redis refused answers of %s, which will be sent again: %s", self._queue.deployment, answer)
            asyncio.get_running_loop().call_later(_RETRY_AFTER_S, self._retry, number)
            return
        if isinstance(answer, Exception):
            return  # the connection is lost; `resend` follows
        if answer == -1:
            self._doubt(number)
            return
        reach("replied")
        batch = self._sent.pop(number, None)
        if batch is None:
            return
        late = len(batch.replies) - answer
        if late and is_first:  # of those sent again, the first ones may have arrived
            logger.warning("%d late results of %s were dropped: others had answered", late, self._queue.deployment)
            count(self._link.sender, self._keys, "late_results", late)

    def _doubt(self, number: int) -> None:
        """Their caller seems dead: ask again, and after DOUBT_S drop them if it still does."""
        batch = self._sent.get(number)
        if batch is not None:
            pause = min(max(batch.doubted_s, _ASK_AGAIN_S[0]), _ASK_AGAIN_S[1], DOUBT_S - batch.doubted_s)
            doubted_s = batch.doubted_s + pause
            self._sent[number] = batch._replace(doubted_s=doubted_s)
            retry = partial(self._retry, number, insist=doubted_s >= DOUBT_S)
            asyncio.get_running_loop().call_later(pause, retry)

    def _retry(self, number: int, *, insist: bool = False) -> None:
        if number in self._sent:
            self._send(number, self._sent[number], self._link.sender, is_first=True, insist=insist)
