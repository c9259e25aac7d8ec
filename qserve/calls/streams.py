"""Results that come in parts, from calls of generator methods."""

import asyncio
import concurrent.futures
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Mapping
from typing import Any, Generic, TypeVar

from qserve.calls.client import Client
from qserve.calls.outgoing import WaitForArguments
from qserve.calls.pending import PendingCall
from qserve.calls.ref import Ref
from qserve.context import CallInfo, current_call
from qserve.errors import CallCancelled, QServeError, StreamBroken
from qserve.wire.channel import Channel
from qserve.wire.codec import Codec, collect_refs
from qserve.wire.messages import ERROR, NO_META, STREAM, Outcome, decode_error
from qserve.wire.parts import Payload, flat

T = TypeVar("T")
OnOutcome = Callable[[Outcome], None]


class ResultStream(Generic[T]):
    """What a generator in a replica yields, as it yields it; iterate it with `for` or `async for`, once.

    The generator runs no further ahead than a window of about 1 MiB. Leaving the loop early, or `close`, closes it.
    Errors of the generator are raised here after what it yielded before. Usable from any thread and event loop.
    """

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
        self._client = client
        self._codec = codec
        self._prepare = prepare
        self._caller = caller
        if caller is not None:
            caller.nested.add(self)
        self._on_end = on_end
        self._error: BaseException | None = None
        self._is_closed = False
        self._pending: PendingCall | None = None
        """None while arguments are waited for."""
        self._channel: concurrent.futures.Future[Channel] = concurrent.futures.Future()

    def __iter__(self) -> Iterator[T]:
        try:
            while (chunk := self._run(self._next)) is not _END:
                yield chunk
        finally:
            self.close()

    async def __aiter__(self) -> AsyncIterator[T]:
        try:
            while (chunk := await self._run_async(self._next)) is not _END:
                yield chunk
        finally:
            self.close()

    def __next__(self) -> T:
        chunk: T = self._run(self._next)
        if chunk is _END:
            self.close()
            raise StopIteration
        return chunk

    async def __anext__(self) -> T:
        chunk: T = await self._run_async(self._next)
        if chunk is _END:
            self.close()
            raise StopAsyncIteration
        return chunk

    @property
    def request_id(self) -> str:
        """The id of the call in logs; "" while a ref among its arguments is waited for."""
        return self._pending.id if self._pending is not None else ""

    def __await__(self) -> Generator[Any, None, "ResultStream[T]"]:
        yield from ()
        return self

    def close(self) -> None:
        """End the call; the replica's generator is closed at its next `yield`."""
        self._end(inherited=False)

    cancel = close

    def inherit_cancellation(self) -> None:
        """End it with the call that made it."""
        self._end(inherited=True)

    @property
    def awaited(self) -> str:
        """Nothing: whoever iterates a stream waits for its next part only."""
        return ""

    # What sends it

    def send(self, payload: Payload) -> None:
        """Put the call with its packed arguments."""
        self._pending = self._prepare(payload, self._settle)
        self._client.run_soon(self._put)

    def fail(self, error: BaseException) -> None:
        """End it with an error that arose in this process, before it was put."""
        if self._caller is not None:
            self._caller.nested.discard(self)
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self._channel.set_exception(error)
            self._on_end(error)

    def done(self) -> bool:
        """Whether it was closed."""
        return self._is_closed

    cancelled = done

    def withdraw(self) -> None:
        """Withdraw what was put."""
        self._end(inherited=False)

    def _end(self, *, inherited: bool) -> None:
        self._is_closed = True
        if self._pending is None:
            self.fail(CallCancelled("the call was cancelled before its arguments were there"))
        else:
            self._client.withdraw(self._pending, inherited=inherited)

    def _put(self) -> None:
        assert self._pending is not None
        channel = self._client.open_channel(self._pending)
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # closed in this moment
            self._channel.set_result(channel)
        self._client.put(self._pending)

    def _settle(self, outcome: Outcome) -> None:
        if self._caller is not None:
            self._caller.nested.discard(self)
        if isinstance(outcome, QServeError):
            self._error = outcome
        elif outcome.kind == ERROR:
            self._error = self._codec.rebuild_error(decode_error(flat(outcome.payload)))
        self._on_end(self._error)

    async def _next(self) -> Any:
        if not self._channel.done():  # arguments are waited for
            await asyncio.wrap_future(self._channel)
        channel = self._channel.result(0)
        try:
            packed = await channel.receive()
        except StreamBroken as exc:
            raise self._error or exc from None
        return _END if packed is None else self._codec.unpack(packed)

    def _run(self, step: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        if self._client.is_own_thread():
            raise RuntimeError("iterating here would block the event loop that receives the stream: use `async for`")
        return asyncio.run_coroutine_threadsafe(step(), self._client.loop).result()

    async def _run_async(self, step: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        if self._client.is_own_thread():
            return await step()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(step(), self._client.loop))


_END = object()


def open_stream(
    client: Client,
    codec: Codec,
    deployment: str,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    timeout_s: float | None,
    *,
    meta: Mapping[str, str] = NO_META,
    on_end: Callable[[BaseException | None], None] = lambda _: None,
) -> ResultStream[Any]:
    """Put a call whose result is streamed; its deadline holds until the first part arrives.

    It inherits the remaining time and the cancellation of the call that makes it, if one does.

    Args:
        timeout_s: None: as the settings say.
        meta: What the hooks of this process tell the hooks of the replica.
        on_end: Called once, on the loop of the client, with the error that ended the stream or with None.

    Raises:
        ValueNotSerializable, PayloadTooLarge: An argument cannot be sent.
    """
    label = f"{deployment}.{method}" if method else deployment
    payload, refs = _payload_or_refs(codec, args, kwargs, label)
    caller = current_call.get()

    def prepare(payload: Payload, on_outcome: OnOutcome) -> PendingCall:
        limit_s = client.settings.handle_timeout_s if timeout_s is None else timeout_s
        if caller is not None:
            limit_s = caller.limit(limit_s)
        return client.prepare(
            deployment,
            kind=STREAM,
            method=method,
            payload=payload,
            timeout_s=limit_s,
            safe=False,
            on_outcome=on_outcome,
            meta=meta,
        )

    stream = ResultStream[Any](client, codec, prepare, label, caller, on_end)
    if payload is not None:
        stream.send(payload)
    else:
        WaitForArguments(stream, codec, args, kwargs, refs).start()
    return stream


def _payload_or_refs(
    codec: Codec, args: tuple[Any, ...], kwargs: dict[str, Any], label: str
) -> tuple[Payload | None, list[Ref[Any]]]:
    """The packed arguments; or None, and the refs among them that have to be waited for."""
    payload = codec.pack_plain_call(args, kwargs)
    if payload is not None:
        return payload, []
    if refs := collect_refs(args, kwargs):
        return None, refs
    return codec.pack_arguments(args, kwargs, f"the call to {label}"), []
