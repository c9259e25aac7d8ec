"""Calls that nobody waits for any more: taken off their queues, or cancelled where they run."""

from functools import partial

from qserve.broker.call_queue import CallQueue
from qserve.broker.connection import Answer
from qserve.broker.inboxes import send_control
from qserve.broker.keys import Keys
from qserve.broker.link import Link
from qserve.calls.pending import PendingCall
from qserve.wire.messages import Control, Signer


class Withdrawals:
    """Withdraws calls of one process. Belongs to the event loop of its client."""

    def __init__(self, keys: Keys, signer: Signer, link: Link) -> None:
        self._keys = keys
        self._signer = signer
        self._link = link

    def withdraw(self, call: PendingCall) -> None:
        """Take a call that has ended off its queue, or have it cancelled where it runs."""
        if call.entry is not None and self._link.sender.is_open:
            queue = CallQueue(self._keys, call.deployment)
            queue.cancel(self._link.sender, call.entry, partial(self._withdrawn, call))

    def _withdrawn(self, call: PendingCall, answer: Answer) -> None:
        if isinstance(answer, bytes) and call.entry is not None:
            control = Control("cancel", call.entry.decode(), call.inherited)
            send_control(self._link.sender, self._keys, self._signer, answer.decode(), control, call.id)
