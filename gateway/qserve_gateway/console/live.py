"""One event stream for each tab: what is live on its page, again whenever it has changed."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from starlette.responses import StreamingResponse

from qserve_gateway.console.rendering import HEADERS

_EVERY_S: Final = 2.0
_SAY_ALIVE_EVERY: Final = 7
MOST_STREAMS: Final = 64
_LASTS_S: Final = 900.0
"""After this a stream ends. The browser asks for another one at once, and whether it still may is looked at anew."""


class LiveStreams:
    """The streams that are open, which are counted so that forgotten tabs cost no more than so much."""

    def __init__(self) -> None:
        self._open = 0

    @property
    def is_full(self) -> bool:
        """Whether no more are let in."""
        return self._open >= MOST_STREAMS

    def response(self, render: Callable[[], str]) -> StreamingResponse:
        """A stream of what `render` gives; it is called on a thread."""
        headers = {**HEADERS, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._events(render), headers=headers, media_type="text/event-stream")

    async def _events(self, render: Callable[[], str]) -> AsyncIterator[str]:
        self._open += 1
        last, quiet, until = "", 0, time.monotonic() + _LASTS_S
        try:
            yield "retry: 3000\n\n"
            while time.monotonic() < until:
                text = await asyncio.to_thread(render)
                quiet += 1
                if text != last:
                    last, quiet = text, 0
                    yield "event: live\n" + "".join(f"data: {line}\n" for line in text.splitlines()) + "\n"
                elif quiet >= _SAY_ALIVE_EVERY:
                    quiet = 0
                    yield ": nothing new\n\n"
                await asyncio.sleep(_EVERY_S)
        finally:
            self._open -= 1
