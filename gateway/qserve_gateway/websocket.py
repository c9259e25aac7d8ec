"""Carries the events of a WebSocket between its client and the replica that serves it."""

import asyncio
import logging

from starlette.types import Receive, Send

from qserve.background import end, spawn
from qserve.errors import StreamBroken
from qserve.wire.channel import Channel
from qserve.wire.messages import HttpResponse, WebSocketEvent, decode_websocket_event, encode
from qserve_gateway.headers import has_control
from qserve_gateway.respond import Unsendable, checked, sent_instead, start_message

logger = logging.getLogger(__name__)

INTERNAL_ERROR = 1011
_CODES = frozenset({*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)})
"""Codes that a close frame may have (RFC 6455, 7.4, and those that have been registered since)."""
_LONGEST_REASON = 123
"""Bytes of a reason in a close frame."""
_LAST_WORD_S = 1.0


class WebSocketBridge:
    """Carries the events of one WebSocket in both directions, until one side ends it.

    Args:
        channel: Leads to the replica; its call is put before `run`.
        receive, send: Lead to the client; its "websocket.connect" has been received.
    """

    def __init__(self, channel: Channel, receive: Receive, send: Send, request_id: str) -> None:
        self._channel = channel
        self._receive = receive
        self._send = send
        self._request_id = request_id
        self._denial = HttpResponse(500, [], b"")
        self._upwards: asyncio.Task[None] | None = None
        self.accepted = False
        self.closed = False

    async def run(self) -> None:
        """Serve the WebSocket to its end.

        Raises:
            StreamBroken: The replica refused or died before it accepted; nothing has been sent.
        """
        upwards = self._upwards = spawn(self._from_client())
        try:
            while (data := await self._channel.receive()) is not None:
                await self._to_client(decode_websocket_event(data))
            await self._close(1000)
        except StreamBroken:
            if not self.accepted and not self.closed:
                raise
            await self._close(INTERNAL_ERROR)
        finally:
            await end(upwards)

    async def _from_client(self) -> None:
        try:
            while True:
                message = await self._receive()
                if message["type"] == "websocket.disconnect":
                    self.closed = True
                    await self._tell_disconnect(message.get("code") or 1005, message.get("reason") or "")
                    return
                event = WebSocketEvent("receive", text=message.get("text"), data=message.get("bytes"))
                await self._channel.send(encode(event))
        except StreamBroken:
            return  # `run` hears of it too

    async def _tell_disconnect(self, code: int, reason: str) -> None:
        try:
            async with asyncio.timeout(_LAST_WORD_S):
                await self._channel.send(encode(WebSocketEvent("disconnect", code=code, reason=reason)))
                await self._channel.end()
        except TimeoutError:  # the application reads nothing; it hears of it when it sends
            self._channel.abort("the client left")

    async def _to_client(self, event: WebSocketEvent) -> None:
        if self.closed:
            return  # an application may not have noticed yet
        try:
            if event.type == "accept":
                await self._accept(event)
            elif event.type == "send":
                content = {"text": event.text} if event.text is not None else {"bytes": event.data}
                await self._send({"type": "websocket.send", **content})
            elif event.type == "close":
                await self._close(event.code, event.reason)
            else:
                await self._take_denial(event)
        except OSError:  # the client has left; what the application sends meanwhile is for nobody
            self.closed = True
            asyncio.get_running_loop().call_later(_LAST_WORD_S, self._tell_sender)

    def _tell_sender(self) -> None:
        """Let an application that sends, and does not read what its client has sent before, know that it has left."""
        if self._upwards is not None and not self._upwards.done():
            self._channel.abort("the client left")

    async def _accept(self, event: WebSocketEvent) -> None:
        try:
            if event.subprotocol is not None and has_control(event.subprotocol.encode()):
                raise Unsendable(f"subprotocol {event.subprotocol[:100]!r}")
            answer = start_message(HttpResponse(200, event.headers, b""), "GET", self._request_id, streamed=True)
        except Unsendable as exc:
            await self._deny(sent_instead(self._request_id, exc))
            return
        self.accepted = True
        subprotocol, headers = event.subprotocol, answer["headers"]
        await self._send({"type": "websocket.accept", "subprotocol": subprotocol, "headers": headers})

    async def _take_denial(self, event: WebSocketEvent) -> None:
        """Hold a denial until it is whole: one that breaks off must not stand in the way of the answer that says so."""
        if event.type == "deny":
            self._denial = HttpResponse(event.code, event.headers, b"")
            return
        held = self._denial
        self._denial = HttpResponse(held.status, held.headers, held.body + (event.data or b""))
        if event.reason != "more":
            await self._deny(self._denial)

    async def _deny(self, response: HttpResponse) -> None:
        self.closed = True
        await deny(self._send, response, self._request_id)

    async def _close(self, code: int, reason: str = "") -> None:
        if self.closed:
            return
        if not self.accepted:
            await self._deny(HttpResponse(403, [], b""))
            return
        self.closed = True
        if code not in _CODES:
            text = "WebSocket %s: its application closes it with %d, which a close frame may not have; 1011 is sent"
            logger.warning(text, self._request_id, code)
            code, reason = INTERNAL_ERROR, ""
        reason = reason.encode()[:_LONGEST_REASON].decode(errors="ignore")  # no half character
        await self._send({"type": "websocket.close", "code": code, "reason": reason})


async def deny(send: Send, response: HttpResponse, request_id: str) -> None:
    """Answer a WebSocket's handshake with an HTTP response."""
    status, headers, body = checked(response, "GET", request_id)
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})
