"""A call whose result comes in parts, on its way: it is sent, ended, and its parts are read."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import InvalidStateError
from typing import Any, Final

from qserve.background import spawn
from qserve.calls.client import STOPPED, Client
from qserve.calls.handoff import run_when_dropped
from qserve.calls.pending import PendingCall
from qserve.calls.ref import Ref
from qserve.context import CallInfo
from qserve.errors import CallCancelled, QServeError, StreamBroken
from qserve.wire.channel import Channel
from qserve.wire.codec import Codec
from qserve.wire.messages import ERROR, Outcome, decode_error
from qserve.wire.parts import Payload, flat

OnOutcome = Callable[[Outcome], None]
END_OF_STREAM: Final = object()


class StreamCall:
    """Sends a call whose result is streamed, ends it, and reads its parts.

    It does not refer to the stream that the reader holds: if nobody holds that any more, the call can be ended.

    Args:
        prepare: Makes the call from its packed arguments.
        caller: The call that makes this one, if one does.
        on_end: Called once, on the loop of the client, with the error that ended the stream or with None.

    Attributes:
        label: The name of what is called, for messages.
        is_closed: Whether its reader has had enough.
    """

    awaited = ""
    """Nobody waits for the call itself: who iterates a stream waits for its next part only."""

    def __init__(
        self,
        client: Client,
        codec: Codec,
        prepare: Callable[[Payload, OnOutcome], PendingCall],
        label: str,
        caller: CallInfo | None,
        on_end: Callable[[BaseException | None], None] = lambda _: None,
    ) -> None:
        self.label = label
        self.is_closed = False
        self._client = client
        self._codec = codec
        self._prepare = prepare
        self._caller = caller
        self._on_end = on_end
        self._error: BaseException | None = None
        self._has_ended = False
        self._pending: PendingCall | None = None
        """None while arguments are waited for."""
        self._channel: Ref[Channel] = Ref()

    @property
    def request_id(self) -> str:
        """The id of the call in logs; "" while a ref among its arguments is waited for."""
        return self._pending.id if self._pending is not None else ""

    # What sends it

    def join_caller(self) -> None:
        """Inherit the cancellation of the call that makes this one, until this one ends."""
        if self._caller is not None:
            self._caller.nested.add(self)

    def send(self, payload: Payload) -> None:
        """Put the call with its packed arguments."""
        self._pending = self._prepare(payload, self._settle)
        self.join_caller()
        self._client.run_soon(self._put)

    def _put(self) -> None:
        assert self._pending is not None
        channel = self._client.open_channel(self._pending)
        with contextlib.suppress(InvalidStateError):  # closed in this moment
            self._channel.set_result(channel)
        self._client.put(self._pending)
        if self.is_closed:  # before there was anything to withdraw
            self._client.withdraw(self._pending)

    def fail(self, error: BaseException) -> None:
        """End it with an error that arose in this process, before it was put."""
        self._end()
        with contextlib.suppress(InvalidStateError):
            self._channel.set_exception(error)
            self._on_end(error)

    def done(self) -> bool:
        """Whether it was closed."""
        return self.is_closed

    cancelled = done

    def withdraw(self) -> None:
        """Withdraw what was put."""
        self.close()

    # What ends it

    def close(self) -> None:
        """End the call; the replica's generator is closed at its next `yield`."""
        self._close(inherited=False)

    def inherit_cancellation(self) -> None:
        """End it with the call that made it."""
        self._close(inherited=True)

    def abandon(self) -> None:
        """Close it later, unless it has ended, because nobody can read it any more. For finalizers."""
        if not self.is_closed and not self._has_ended:
            run_when_dropped(self._client, self.close)

    def _close(self, *, inherited: bool) -> None:
        self.is_closed = True
        if self._pending is None:
            self.fail(CallCancelled("the call was cancelled before its arguments were there"))
        else:
            self._client.withdraw(self._pending, inherited=inherited)

    def _settle(self, outcome: Outcome) -> None:
        self._end()
        if isinstance(outcome, QServeError):
            self._error = outcome
        elif outcome.kind == ERROR:
            self._error = self._codec.rebuild_error(decode_error(flat(outcome.payload)))
        self._on_end(self._error)

    def _end(self) -> None:
        self._has_ended = True
        if self._caller is not None:
            self._caller.nested.discard(self)

    # What reads it

    async def next_part(self) -> Any:
        """The next part, or END_OF_STREAM; on the loop of the client. Whoever gives up waiting misses nothing.

        Raises:
            Exception: What ended the stream, after all parts before that.
        """
        channel = await self._channel  # which is there once the arguments are
        try:
            packed = await channel.receive()
        except StreamBroken as exc:
            raise self._error or exc from None
        return END_OF_STREAM if packed is None else self._codec.unpack(packed)

    def begin_to_read(self) -> Ref[Any]:
        """Read the next part from any thread; whoever gives up waiting for the ref has to keep it for the next one."""
        part: Ref[Any] = Ref()
        try:
            self._client.loop.call_soon_threadsafe(self._start_to_read, part)
        except RuntimeError:  # the loop has closed
            part.set_exception(self._error or CallCancelled(STOPPED))
        return part

    def _start_to_read(self, part: Ref[Any]) -> None:
        spawn(self._read(part))

    async def _read(self, part: Ref[Any]) -> None:
        try:
            part.set_result(await self.next_part())
        except asyncio.CancelledError:  # the loop ends
            part.cancel()
            raise
        except Exception as exc:
            part.set_exception(exc)
        finally:
            del part  # else the traceback would hold the ref that holds the error
