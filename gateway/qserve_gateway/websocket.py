"""Carries the events of a WebSocket between its client and the replica that serves it."""

import asyncio
import logging
from typing import Any

from starlette.types import Receive, Send

from qserve.background import end, spawn
from qserve.errors import StreamBroken
from qserve.wire.channel import Channel
from qserve.wire.messages import HttpResponse, WebSocketEvent, decode_websocket_event, encode
from qserve_gateway.respond import Unsendable, start_message

logger = logging.getLogger(__name__)

INTERNAL_ERROR = 1011
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
        self.accepted = False
        self.closed = False

    async def run(self) -> None:
        """Serve the WebSocket to its end.

        Raises:
            StreamBroken: The replica refused or died before it accepted; nothing has been sent.
        """
        upwards = spawn(self._from_client())
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
        message: dict[str, Any] = {"type": f"websocket.{event.type}"}
        if event.type == "accept":
            self.accepted = True
            headers = start_message(HttpResponse(200, event.headers, b""), "GET", self._request_id, streamed=True)
            message |= {"subprotocol": event.subprotocol, "headers": headers["headers"]}
        elif event.type == "send":
            message |= {"text": event.text} if event.text is not None else {"bytes": event.data}
        elif event.type == "close":
            self.closed = True
            message |= {"code": event.code, "reason": event.reason}
        else:
            await self._take_denial(event)
            return
        try:
            await self._send(message)
        except OSError:  # the client has left; what the application sends meanwhile is for nobody
            self.closed = True

    async def _take_denial(self, event: WebSocketEvent) -> None:
        """Hold a denial until it is whole: one that breaks off must not stand in the way of the answer that says so."""
        if event.type == "deny":
            self._denial = HttpResponse(event.code, event.headers, b"")
            return
        held = self._denial
        self._denial = HttpResponse(held.status, held.headers, held.body + (event.data or b""))
        if event.reason != "more":
            self.closed = True
            await deny(self._send, self._denial, self._request_id)

    async def _close(self, code: int) -> None:
        if not self.closed:
            self.closed = True
            await self._send({"type": "websocket.close", "code": code, "reason": ""})


async def deny(send: Send, response: HttpResponse, request_id: str) -> None:
    """Answer a WebSocket's handshake with an HTTP response."""
    try:
        head = start_message(response, "GET", request_id)
    except Unsendable:
        logger.exception("the denial of WebSocket %s cannot be sent as it is; 500 is sent in its place", request_id)
        response = HttpResponse(500, [], b"")
        head = start_message(response, "GET", request_id)
    await send(head | {"type": "websocket.http.response.start"})
    await send({"type": "websocket.http.response.body", "body": response.body})
