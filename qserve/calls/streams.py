"""Results that come in parts, from calls of generator methods."""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from typing import Any, Generic

from typing_extensions import TypeVar

from qserve.calls.client import Client
from qserve.calls.outgoing import WaitForArguments, meta_within
from qserve.calls.pending import PendingCall
from qserve.calls.ref import Ref
from qserve.calls.stream_call import END_OF_STREAM, OnOutcome, StreamCall
from qserve.context import current_call
from qserve.wire.codec import Codec, collect_refs
from qserve.wire.messages import NO_META, STREAM
from qserve.wire.parts import Payload

T = TypeVar("T", default=Any)


class ResultStream(Generic[T]):
    """What a generator in a replica yields, as it yields it; iterate it with `for` or `async for`, once.

    The generator runs no further ahead than a window of about 1 MiB. Leaving the loop early closes it, and so do
    `close` and dropping the stream. Errors of the generator are raised here after what it yielded before. Who gives up
    waiting for a part, as with `asyncio.wait_for(anext(stream), 1)`, gets that part next. Usable from any thread and
    event loop.
    """

    def __init__(self, client: Client, call: StreamCall) -> None:
        self._client = client
        self._call = call
        self._begun: list[Ref[Any]] = []
        """Parts that are being read, or are there, and that somebody has given up to wait for."""

    def __del__(self) -> None:
        self._call.abandon()

    def __iter__(self) -> Iterator[T]:
        try:
            while (part := self._wait_for_part()) is not END_OF_STREAM:
                yield part
        finally:
            self.close()

    async def __aiter__(self) -> AsyncIterator[T]:
        try:
            while (part := await self._await_part()) is not END_OF_STREAM:
                yield part
        finally:
            self.close()

    def __next__(self) -> T:
        part: T = self._wait_for_part()
        if part is END_OF_STREAM:
            self.close()
            raise StopIteration
        return part

    async def __anext__(self) -> T:
        part: T = await self._await_part()
        if part is END_OF_STREAM:
            self.close()
            raise StopAsyncIteration
        return part

    @property
    def label(self) -> str:
        """The name of what is called."""
        return self._call.label

    @property
    def request_id(self) -> str:
        """The id of the call in logs; "" while a ref among its arguments is waited for."""
        return self._call.request_id

    def __await__(self) -> Generator[Any, None, "ResultStream[T]"]:
        yield from ()
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            f"the stream of {self.label} cannot be sent or pickled, because its parts arrive in this process: iterate "
            "it, and send or yield its parts"
        )

    def close(self) -> None:
        """End the call; the replica's generator is closed at its next `yield`."""
        self._call.close()

    cancel = close

    def done(self) -> bool:
        """Whether it was closed."""
        return self._call.is_closed

    cancelled = done

    def _wait_for_part(self) -> Any:
        if self._client.is_own_thread():
            raise RuntimeError("iterating here would block the event loop that receives the stream: use `async for`")
        part = self._next_begun() or self._call.begin_to_read()
        try:
            return part.result()
        except BaseException as exc:
            if not part.done() or not (part.cancelled() or part.exception() is exc):  # interrupted, as with Ctrl+C
                self._begun.append(part)
            raise

    async def _await_part(self) -> Any:
        part = self._next_begun()
        if part is None:
            if self._client.is_own_thread():
                return await self._call.next_part()
            part = self._call.begin_to_read()
        try:
            return await part
        except (asyncio.CancelledError, GeneratorExit):
            self._begun.append(part)
            raise

    def _next_begun(self) -> Ref[Any] | None:
        try:
            return self._begun.pop(0) if self._begun else None
        except IndexError:  # another thread was faster
            return None


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

    It inherits the remaining time, the cancellation and the request id of the call that makes it, if one does.

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
            meta=meta if caller is None else meta_within(caller, meta),
        )

    call = StreamCall(client, codec, prepare, label, caller, on_end)
    if payload is not None:
        call.send(payload)
    else:
        call.join_caller()
        WaitForArguments(call, codec, args, kwargs, refs).start()
    return ResultStream(client, call)


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
