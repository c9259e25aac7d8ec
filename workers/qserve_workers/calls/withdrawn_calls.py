"""Calls whose caller has left."""

from qserve.errors import StreamBroken
from qserve.wire.messages import HTTP, STREAM
from qserve_workers.calls.slots import Slots

_KEPT = 8192


class WithdrawnCalls:
    """Ends calls whose caller has left, and remembers those that have not arrived yet."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._marked: dict[bytes, None] = {}

    def __contains__(self, entry: bytes) -> bool:
        return entry in self._marked

    def withdraw(self, entry: bytes, *, inherited: bool = False) -> None:
        """The caller of a call has left: code that listens for that hears of it.

        A call that is safe to leave half done is cancelled, with the calls it has made, unless it is on a thread; one
        that only streams is, too. A response that has begun is ended by its application, which may have background
        tasks to run after it. A call that has not arrived yet will not start.

        Args:
            inherited: The call that made it was cancelled.
        """
        running = self._slots.get(entry)
        if running is None or running.task is None:
            self._marked[entry] = None
            if len(self._marked) > _KEPT:
                del self._marked[next(iter(self._marked))]
            return
        running.unwanted = True
        if running.channel is not None:
            running.channel.close(StreamBroken("the caller has left, so nobody reads what this call still sends"))
        if inherited or running.call.kind == STREAM or self._slots.may_run_again(running.call):
            running.info.cancel_nested()
            if running.call.kind == HTTP and running.channel is not None and running.channel.sent:
                return
            if running.began and not running.needs_thread:  # a task cancelled before its first step never takes it
                running.task.cancel()
