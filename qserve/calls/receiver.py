"""Reads a process' inbox: in order, verified, trimmed, and for as long as the process says that it lives."""

import asyncio
import logging
from collections.abc import Callable

from qserve.broker.connection import Answer, Connection
from qserve.broker.counters import count
from qserve.broker.inboxes import Inbox
from qserve.broker.keys import Keys
from qserve.broker.link import BLOCK_MS, Link
from qserve.broker.redis_errors import ASK_AGAIN_S, CommandRefused, is_moving
from qserve.errors import FrameRejected
from qserve.wire.messages import CONTROL, UNREADABLE, Control, Reply, Signer, decode_reply, encode

logger = logging.getLogger(__name__)

_ENTRIES_PER_READ = 128
"""Each may hold a hundred replies, and all of a read are dealt with before the event loop goes on."""
_BUSY = 2
"""Messages in one read, from which on more are about to come: then it is enough to look when calls are sent."""
_TRIM_EVERY = 512 * 1024
"""Bytes: what is streamed to this process must not pile up behind it."""


class Receiver:
    """The reading half of a client. Belongs to its event loop.

    Args:
        accept: Gets every message whose signature holds; raises FrameRejected for one that is not for this process.
        is_awaited: Whether a message may come that somebody waits for, although nothing is sent any more.
    """

    def __init__(
        self,
        keys: Keys,
        process: str,
        signer: Signer,
        link: Link,
        accept: Callable[[Reply], None],
        *,
        is_awaited: Callable[[], bool],
    ) -> None:
        self._keys = keys
        self._signer = signer
        self._accept = accept
        self._inbox = Inbox(keys, process)
        self._link = link
        self._tick = link.end_of_tick
        self._is_awaited = is_awaited
        self._rests = False
        link.expect = self._end_rest
        # What scripts write, which cannot sign it: it only makes its reader look.
        self._unsigned = {b"": Reply("", process, CONTROL, encode(Control("move")))}

    async def open(self) -> None:
        """Begin to read, or go on, because the link is up. From now on replies are accepted."""
        await self._inbox.open(self._link.sender)
        self._rests = False
        self._read()

    def discard(self) -> None:
        """Close the inbox for good: later replies are dropped."""
        self._inbox.discard(self._link.sender)

    async def newest(self, sender: Connection) -> bytes:
        """The id of the newest message in the inbox."""
        return await self._inbox.newest(sender)

    def has_seen(self, message: bytes) -> bool:
        """Whether a message, and so all before it, has been read."""
        return self._inbox.has_seen(message)

    async def keep_alive(self, on_tick: Callable[[], None]) -> None:
        """Say every second, or REST_S, that the inbox is read, trim it, notice a silent link, and call `on_tick`."""
        while True:
            await asyncio.sleep(self._link.pause_s)
            self._link.check()
            self._end_rest()
            if not self._link.sender.is_open:
                continue
            self._inbox.say_alive(self._link.sender)
            self._inbox.trim(self._link.sender)
            on_tick()

    def _read(self, block_ms: int = BLOCK_MS) -> None:
        if self._link.waiter.is_open:
            self._inbox.read(self._link.waiter, self._received, block_ms=block_ms, most=_ENTRIES_PER_READ)

    def _end_rest(self) -> None:
        """Read again: something was sent that is answered here, or a second has passed."""
        if self._rests:
            self._rests = False
            self._read()

    def _read_again(self, waiter: Connection) -> None:
        if waiter is self._link.waiter:  # else a read has begun where the inbox is now
            self._read()

    def _read_along(self) -> None:
        """Read with the commands that are about to leave, if there are any; else wait on the other connection."""
        if self._link.sender.has_unsent:
            self._inbox.look(self._link.sender, self._received, most=_ENTRIES_PER_READ)
        else:
            self._read()

    def _received(self, answer: Answer) -> None:
        if isinstance(answer, Exception):
            if isinstance(answer, CommandRefused) and is_moving(answer):
                asyncio.get_running_loop().call_later(ASK_AGAIN_S, self._read_again, self._link.waiter)
            elif isinstance(answer, CommandRefused):
                logger.warning("reading replies failed: %s", answer)
                self._link.lose()
            return
        frames = self._inbox.frames(answer)
        for frame in frames:
            try:
                self._accept(decode_reply(self._signer.open(frame)))
            except (FrameRejected, *UNREADABLE) as exc:
                if (known := self._unsigned.get(frame)) is not None:
                    self._accept(known)
                else:
                    self._reject(exc)
        # After the replies, for which somebody waits.
        if self._tick is not None and len(frames) >= _BUSY:
            self._tick.read(self._read_along)
        elif frames and self._tick is None and not self._is_awaited():
            self._rests = True  # the next call goes first, and Redis looks at it and at the read in one turn
        else:
            self._read(BLOCK_MS if frames else int(1000 * self._link.pause_s))
        if self._inbox.untrimmed >= _TRIM_EVERY and self._link.sender.is_open:
            self._inbox.trim(self._link.sender)

    def _reject(self, exc: Exception) -> None:
        logger.warning("dropped a frame in the inbox: %s", exc)
        count(self._link.sender, self._keys, "rejected_frames")
