"""An event stream for each tab that somebody looks at: what is live on its page, again whenever it has changed."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Hashable
from typing import Final

from starlette.responses import StreamingResponse

from qserve_gateway.console.rendering import HEADERS

_EVERY_S: Final = 2.0
_AS_GOOD_AS_NEW_S: Final = 1.5
_SAY_ALIVE_EVERY: Final = 7
MOST_STREAMS: Final = 64
_LASTS_S: Final = 900.0
"""After this a stream ends. The browser asks for another one at once, and whether it still may is looked at anew."""


class LivePart:
    """What is live on a page, rendered once for all who look at it at the same time.

    Args:
        render: Called on a thread.
    """

    def __init__(self, render: Callable[[], str]) -> None:
        self.streams = 0
        self._render = render
        self._rendering = asyncio.Lock()
        self._text = ""
        self._until = 0.0

    async def text(self) -> str:
        """How it is now, or was a moment ago."""
        async with self._rendering:
            if time.monotonic() >= self._until:
                self._text = await asyncio.to_thread(self._render)
                self._until = time.monotonic() + _AS_GOOD_AS_NEW_S
            return self._text


class LiveStreams:
    """The streams that are open, which are counted so that forgotten tabs cost no more than so much."""

    def __init__(self) -> None:
        self._parts: dict[Hashable, LivePart] = {}

    @property
    def is_full(self) -> bool:
        """Whether no more are let in."""
        return sum(part.streams for part in self._parts.values()) >= MOST_STREAMS

    def response(self, page: Hashable, render: Callable[[], str]) -> StreamingResponse:
        """A stream of what `render` gives; streams of one page share what one of them has rendered."""
        headers = {**HEADERS, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._events(page, render), headers=headers, media_type="text/event-stream")

    async def _events(self, page: Hashable, render: Callable[[], str]) -> AsyncGenerator[str, None]:
        part = self._parts.setdefault(page, LivePart(render))
        part.streams += 1
        last, quiet, until = "", 0, time.monotonic() + _LASTS_S
        try:
            yield "retry: 3000\n\n"
            while time.monotonic() < until:
                text = await part.text()
                quiet += 1
                if text != last:
                    last, quiet = text, 0
                    yield "event: live\n" + "".join(f"data: {line}\n" for line in text.splitlines()) + "\n"
                elif quiet >= _SAY_ALIVE_EVERY:
                    quiet = 0
                    yield ": nothing new\n\n"
                await asyncio.sleep(_EVERY_S)
        finally:
            part.streams -= 1
            if not part.streams:
                self._parts.pop(page, None)
