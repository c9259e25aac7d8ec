"""A connection to a server of a cluster for one of its shards, which shares it with others."""

from collections.abc import Callable
from typing import Any

from qserve.broker.connection import Answer, Connection
from qserve.broker.redis_errors import NotTaken


class Lane(Connection):
    """What looks like a connection of its own. It can be retired or closed while the other lanes go on.

    Args:
        line: The connection that is shared.
        on_left: Called once when this lane does not use it any more.
    """

    def __init__(
        self,
        line: Connection,
        on_left: Callable[["Lane"], None],
        on_lost: Callable[[], None] | None = None,
        on_moved: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(on_lost, on_moved)
        self._line = line
        self._on_left = on_left
        self._loop = line._loop
        self._server = line._server
        self._transport = line._transport

    def send(self, on_answer: Callable[[Answer], None], *command: Any) -> None:
        if self._transport is None:
            super().send(on_answer, *command)
            return
        self._line.send(self._answered, *command)
        self._waiting.append(on_answer)

    def _answered(self, answer: Answer) -> None:
        if not self._waiting:
            return  # this lane was closed meanwhile
        self.heard += 1
        if type(answer) is NotTaken:
            self._loop.call_soon(self._on_moved)
        self._waiting.popleft()(answer)
        if self._retired is not None and not self._waiting:
            self._lose()

    @property
    def has_unsent(self) -> bool:
        return self._transport is not None and self._line.has_unsent

    def flush(self) -> None:
        self._line.flush()

    def give_up(self) -> None:
        self._line.abort()

    def abort(self) -> None:
        if self._transport is not None or self._retired is not None:
            self._lose()

    def line_lost(self) -> None:
        """The connection is gone, and every command of this lane has been told so."""
        self.abort()

    def _lose(self) -> None:
        super()._lose()
        self._on_left(self)
