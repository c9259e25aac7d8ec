"""The calls of HTTP requests: put on their queues, and waited for as long as their clients wait."""

import asyncio
from collections.abc import Callable
from functools import partial

from starlette.types import Receive, Send

from qserve.broker.large.lending import Loan
from qserve.calls.client import Client
from qserve.calls.pending import PendingCall
from qserve.errors import QServeError, ReplicaDied
from qserve.wire.channel import Channel
from qserve.wire.messages import (
    HTTP,
    HTTP_RESPONSE,
    HttpRequest,
    LargeReply,
    Outcome,
)
from qserve_gateway.bodies.large_bodies import LargeBodies, LargeBody, LargeResponse
from qserve_gateway.bodies.streaming import ClientDisconnected, Upload, stream_response
from qserve_gateway.door.body_protocol import BodyProtocol
from qserve_gateway.respond import may_have_run
from qserve_gateway.routes import Route

TICK_S = 0.02
_HALF_READ = "the replica that was reading the request's body has died; a body that is half read is not sent again"


class StreamedResponse:
    """A response that the replica sends in parts; its first part is waiting.

    Args:
        channel: Brings the parts.
        cancel: Withdraws the call; without effect where it has ended.
    """

    __slots__ = ("_cancel", "_channel", "upload")

    def __init__(self, channel: Channel, cancel: Callable[[], None]) -> None:
        self._channel = channel
        self._cancel = cancel
        self.upload: Upload | None = None
        """The request's body, where it is still coming in."""

    async def write(self, send: Send, receive: Receive, method: str, request_id: str) -> None:
        """Write the parts as they come, until there are no more or the client leaves.

        Raises:
            ResponseCut: The replica did not finish it.
        """
        try:
            listen = receive if self.upload is None else None
            await stream_response(send, listen, self._channel, method, request_id)
        finally:
            if self.upload is not None:
                await self.upload.stop()
            self._cancel()


Answer = Outcome | StreamedResponse | None
"""What a request's call comes to; None when the client has left."""
Answered = Outcome | StreamedResponse | LargeResponse
"""What a request is answered with."""


class HttpCalls:
    """Puts the calls of HTTP requests and waits for their answers.

    Args:
        client: Puts the calls.
        largest_body: Most bytes of a request's body.
        leaving: Set when the gateway leaves: a request that is cancelled then is still to be answered.
    """

    def __init__(self, client: Client, largest_body: int, leaving: asyncio.Event) -> None:
        self._client = client
        self._leaving = leaving
        self._largest_body = largest_body
        self._bodies = LargeBodies(client.settings.out_of_line_bytes, largest_body)
        self._departures = _Departures()
        self._loop: asyncio.AbstractEventLoop | None = None

    def large_body(self, route: Route, request: HttpRequest, length: int) -> LargeBody | None:
        """Memory for the body of a request; None if the body is small, or to be sent on as it comes in."""
        return self._bodies.begin(self._client.of(route.deployment).lending, request, length)

    async def answer_large(
        self, route: Route, body: LargeBody, safe: bool, receive: Receive, connection: BodyProtocol | None
    ) -> Answered:
        """Do as `answer` for a request whose body is read first; what comes in slowly is sent on as it does.

        Args:
            connection: Where it comes in, if nobody else has to see it.
        """
        try:
            if await body.read(receive, connection):
                return await self.answer(route, body.payload(follows=False), safe, receive)
            return await self.answer_upload(route, body.payload(follows=True), body.size, receive)
        finally:
            self._bodies.end(body)

    async def answer(self, route: Route, payload: bytes | Loan, safe: bool, receive: Receive) -> Answered:
        """Put a call and wait for its reply, or for the beginning of a streamed one.

        Args:
            payload: The encoded request, whose body has been read to its end.
            safe: It may be run again after its replica died.

        Raises:
            ClientDisconnected: The client has left; the call is withdrawn.
            CancelledError: The request is cancelled, and its call withdrawn. Where the gateway leaves, an error that
                says that the call may have run is returned in its place, unless it is safe.
        """
        client = self._client.of(route.deployment)
        pending, future = self.prepare(route, payload, safe)
        client.put(pending)
        answer = None
        if not route.outlives_client:
            self._departures.watch(future, receive)
        try:
            answer = await future
        except asyncio.CancelledError:
            if pending.safe or not self._leaving.is_set():
                raise
            return may_have_run()
        finally:
            self._departures.forget(future)
            if answer is None:
                client.cancel(pending)
        if answer is None:
            raise ClientDisconnected("the client left")
        return large_or_not(answer)

    async def answer_upload(self, route: Route, payload: bytes | Loan, sent: int, receive: Receive) -> Answered:
        """Do as `answer`, and send the rest of the body on as it comes in; a half-read body cannot be run again.

        Args:
            sent: Bytes of the body that the payload has already.
        """
        client = self._client.of(route.deployment)
        pending, future = self.prepare(route, payload, safe=False)

        def on_end(error: QServeError | None) -> None:
            if not future.done():
                future.set_result(error)

        channel = client.open_channel(pending)
        channel.on_second_peer = partial(on_end, ReplicaDied(_HALF_READ))
        upload = Upload(
            channel,
            receive,
            sent=sent,
            limit=self._largest_body,
            on_end=on_end,
        )
        client.put(pending)
        upload.start()
        answer = None
        try:
            answer = await future
        except asyncio.CancelledError:
            if pending.safe or not self._leaving.is_set():
                raise
            return may_have_run()
        finally:
            if isinstance(answer, StreamedResponse):
                answer.upload = upload
            else:
                await upload.stop()
                client.cancel(pending)  # without effect where there is an outcome
        if answer is None:
            raise ClientDisconnected("the client left")
        return large_or_not(answer)

    def prepare(
        self, route: Route, payload: bytes | Loan, safe: bool, kind: int = HTTP
    ) -> tuple[PendingCall, asyncio.Future[Answer]]:
        """Make a call ready to be put; the future gets its answer."""
        # Asking for the running loop is a system call (it compares process ids), 4 % of a request: once is enough.
        loop = self._loop = self._loop or asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()

        def on_outcome(outcome: Outcome) -> None:
            if not future.done():
                future.set_result(outcome)

        client = self._client.of(route.deployment)
        pending = client.prepare(
            route.deployment,
            kind=kind,
            method="",
            payload=payload,
            timeout_s=route.timeout_s,
            safe=safe,
            on_outcome=on_outcome,
            meta=route.meta,
        )

        def on_stream(pending: PendingCall, channel: Channel) -> None:
            if not future.done():
                future.set_result(StreamedResponse(channel, partial(client.cancel, pending)))

        pending.on_stream = on_stream
        pending.is_strict = route.client_sets_deadline
        return pending, future


def large_or_not(answer: Outcome | StreamedResponse) -> Answered:
    """An answer, or the response that a large reply is."""
    is_large = type(answer) is LargeReply and answer.kind == HTTP_RESPONSE
    return LargeResponse(answer) if is_large else answer  # type: ignore[arg-type]


class _Departures:
    """Resolves the future of a waiting call with None when its client disconnects.

    Listening means a task per call (about 10 us, a sixth of what a request costs), so only calls that have waited for
    one to two ticks are listened to. A quick call costs an entry in a dict, and a client that leaves is noticed at once
    afterwards, or within 40 ms.
    """

    def __init__(self) -> None:
        self._fresh: dict[asyncio.Future[Answer], Receive] = {}
        self._older: dict[asyncio.Future[Answer], Receive] = {}
        self._listeners: dict[asyncio.Future[Answer], asyncio.Task[None]] = {}
        self._ticking = False

    def watch(self, future: asyncio.Future[Answer], receive: Receive) -> None:
        """Begin to look after a call; the request's body must have been read."""
        self._fresh[future] = receive
        if not self._ticking:
            self._ticking = True
            future.get_loop().call_later(TICK_S, self._tick)

    def forget(self, future: asyncio.Future[Answer]) -> None:
        """End it; harmless for a call that was never watched."""
        if self._fresh.pop(future, None) is None and self._older.pop(future, None) is None:
            listener = self._listeners.pop(future, None)
            if listener is not None:
                listener.cancel()

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        for future, receive in self._older.items():
            self._listeners[future] = loop.create_task(_listen(future, receive))
        self._older, self._fresh = self._fresh, {}
        self._ticking = bool(self._older)
        if self._ticking:
            loop.call_later(TICK_S, self._tick)


async def _listen(future: asyncio.Future[Answer], receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    if not future.done():
        future.set_result(None)
