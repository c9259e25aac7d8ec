"""Responses to HTTP/1.0 requests: that version knows no chunks, so one without a length ends with its connection."""

import sys
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


def ended_by_closing(app: ASGIApp, cycle: RequestResponseCycle, reset: Callable[[], None]) -> ASGIApp:
    """Make an application whose responses are never in chunks.

    Args:
        cycle: Writes the response; it closes the connection afterwards, as it does with HTTP/1.0.
        reset: Ends the connection so that the client sees an error. Nothing else tells it that a response was cut.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        without_length = False

        async def send_unchunked(message: Message) -> None:
            nonlocal without_length
            if message["type"] == "http.response.start":
                without_length = all(name.lower() != b"content-length" for name, _ in message["headers"])
                if without_length:
                    cycle.chunked_encoding = False
                    cycle.expected_content_length = sys.maxsize
            elif without_length and not message.get("more_body", False):
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        try:
            await app(scope, receive, send_unchunked)
        except BaseException:
            if without_length and not cycle.response_complete:
                reset()
            raise

    return answer
