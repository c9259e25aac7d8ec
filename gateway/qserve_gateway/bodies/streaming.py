"""Bodies in parts: a large upload on its way to the replica, a streamed response on its way to the client."""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from starlette.types import Message, Receive, Send

from qserve.background import end, spawn
from qserve.errors import PayloadTooLarge, QServeError, StreamBroken
from qserve.wire.channel import Channel
from qserve.wire.messages import decode_http_response
from qserve_gateway.door.body_protocol import cycle_of
from qserve_gateway.respond import Unsendable, send_response, start_message

PAUSE_S = 0.05
PATIENCE_S = 1.0
"""How long a body may pause, and take in all, until the application gets what there is of it: it may want to see the
beginning of a slow upload before its end."""
_CUT_BY_US = "a response was cut: this gateway is leaving, and waits no longer for its end"


class ResponseCut(Exception):
    """A response could not be finished, and the connection must not end as if it had been."""


class ClientDisconnected(StreamBroken):
    """The client has left: nobody reads a response any more."""


class OneLinePerCut(logging.Filter):
    """Shortens what uvicorn logs of a response that was cut: a traceback says nothing about a fault elsewhere."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Make a warning of one line of a record about a cut response, and drop those about clients' invalid UTF-8."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, UnicodeDecodeError) and record.msg.startswith("Invalid UTF-8"):
            return False  # the client is told with 1007, as with the codes of its other mistakes
        # Nobody but a gateway that leaves cancels what uvicorn runs.
        text = _CUT_BY_US if isinstance(error, asyncio.CancelledError) else str(error)
        if isinstance(error, ResponseCut | asyncio.CancelledError):
            record.msg, record.args, record.exc_info = text, (), None
            record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


async def read_beginning(receive: Receive, *, declared: int, most: int, limit: int) -> tuple[bytes, bool]:
    """Read the body of a request, or its beginning and True where it has more than `most` bytes, or pauses.

    Args:
        receive: Of the request; one `until_it_pauses` ends the beginning at a pause.
        declared: What Content-Length says, 0 without one.
        most: How many bytes may be put on a queue.
        limit: Most bytes of the whole body.

    Raises:
        PayloadTooLarge: The body is over the limit.
        ClientDisconnected: The client has left before the body was whole.
    """
    if declared > limit:
        raise body_too_large(limit)
    parts: list[bytes] = []
    size = 0
    more = True
    try:
        while more and size <= most:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected("the client left before the body of its request was whole")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
    except TimeoutError:
        more = True
    if size > limit:
        raise body_too_large(limit)
    return parts[0] if len(parts) == 1 else b"".join(parts), more


def keeping(receive: Receive) -> Receive:
    """Make a `receive` that loses nothing where somebody gives up waiting for it: whoever asks next gets it.

    The connection's own is such a one. That of a middleware may be given up after it has got a part of a body.
    """
    if cycle_of(receive) is not None:
        return receive
    waiting: asyncio.Future[Message] | None = None

    async def receive_kept() -> Message:
        nonlocal waiting
        waiting = waiting or asyncio.ensure_future(receive())
        await asyncio.wait((waiting,))
        arrived, waiting = waiting, None
        return arrived.result()

    return receive_kept


def until_it_pauses(receive: Receive) -> Receive:
    """Make a `receive` that raises TimeoutError when the body pauses, or has taken too long."""
    loop = asyncio.get_running_loop()
    end = loop.time() + PATIENCE_S

    async def receive_soon() -> Message:
        async with asyncio.timeout_at(min(end, loop.time() + PAUSE_S)):
            return await receive()

    return receive_soon


class Upload:
    """The part of a body that follows its request, sent to the replica as it comes in.

    Args:
        receive: Of the request; its first `sent` bytes are with the replica already.
        limit: Most bytes of the whole body.
        on_end: Called with the error that ends the request, or with None when the client has left.
    """

    def __init__(
        self, channel: Channel, receive: Receive, *, sent: int, limit: int, on_end: Callable[[QServeError | None], None]
    ) -> None:
        self._channel = channel
        self._receive = receive
        self._size = sent
        self._limit = limit
        self._on_end = on_end
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to send the body on."""
        self._task = spawn(self._pump())

    async def stop(self) -> None:
        """Stop sending, because the replica has answered or nobody waits for it."""
        task, self._task = self._task, None  # its end refers to this object, and the collector comes seldom
        await end(task)

    async def _pump(self) -> None:
        with contextlib.suppress(StreamBroken):  # the call's outcome says why
            more = True
            while more:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    self._channel.abort(ClientDisconnected("the client left"))
                    self._on_end(None)
                    return
                body = message.get("body", b"")
                self._size += len(body)
                if self._size > self._limit:
                    self._channel.abort("the request's body is too large")
                    self._on_end(body_too_large(self._limit))
                    return
                if body:
                    await self._channel.send(body)
                more = message.get("more_body", False)
            await self._channel.end()
            while (await self._receive())["type"] != "http.disconnect":
                pass
            self._channel.abort(ClientDisconnected("the client left"))
            self._on_end(None)


def body_too_large(limit: int) -> PayloadTooLarge:
    """The error for a request whose body is over the limit."""
    return PayloadTooLarge(f"the request's body is over the limit of {limit} bytes (QSERVE_MAX_BODY_BYTES)")


async def stream_response(send: Send, receive: Receive | None, channel: Channel, method: str, request_id: str) -> None:
    """Write a streamed response, part by part, no faster than the client reads.

    Args:
        receive: Tells when the client leaves; None where somebody else listens.

    Raises:
        ResponseCut: It cannot be finished.
    """
    listener = spawn(_abort_on_disconnect(receive, channel)) if receive is not None else None
    try:
        if not await _send_head(send, channel, method, request_id):
            return
        while (part := await channel.receive_part()) is not None:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    except ClientDisconnected:
        return
    except StreamBroken as exc:
        raise ResponseCut(f"the response to request {request_id} was cut: {exc}") from exc
    finally:
        await end(listener)


async def _send_head(send: Send, channel: Channel, method: str, request_id: str) -> bool:
    """Write the beginning; False if the response is over, because another one was sent in its place."""
    head = await channel.receive()
    if head is None:
        raise StreamBroken("its beginning was lost on its way from the replica")
    response = decode_http_response(head)
    try:
        start = start_message(response, method, request_id, streamed=True)
    except Unsendable:
        channel.abort("the response cannot be sent")
        await send_response(send, response, method, request_id)
        return False
    await send(start)
    return True


async def _abort_on_disconnect(receive: Receive, channel: Channel) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    channel.abort(ClientDisconnected("the client left"))
