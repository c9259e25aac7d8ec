"""Calls for one of many models: they go to a replica that holds the model, if it has room, and else to anybody."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from qserve.background import spawn
from qserve.broker.connection import Answer
from qserve.broker.inboxes import send_control
from qserve.broker.instance.held_models import HeldModels
from qserve.broker.link import Link
from qserve.broker.redis_errors import CommandRefused, NotTaken
from qserve.broker.replica_queue import Entry, ReplicaQueue
from qserve.context import ModelShelf
from qserve.errors import BrokerUnavailable
from qserve.settings import Settings
from qserve.wire.messages import Control, Signer
from qserve_workers.calls.withdrawn_calls import WithdrawnCalls

logger = logging.getLogger(__name__)

_PATIENCE_S = 1.0
"""So long a call waits for room in the replica that holds its model; then the one that read it runs it."""
_TRIES = 3
"""How often it is asked anew who is to run a call, because meanwhile another replica is better placed."""
_LOADED_WITHIN_S = 5.0
"""A call that does not load its model for so long does not need it."""
_REMEMBERED = 1024


class _Asked(NamedTuple):
    """A call of which it is asked who is to run it."""

    entry: bytes
    model: str
    keep: Callable[[], None]
    forget: Callable[[], None]
    tries: int


class _Adopted(NamedTuple):
    """A call that waits for room here; its sender takes it back when that takes too long, if there is one."""

    sender: str
    timer: asyncio.TimerHandle | None


class ModelAffinity:
    """Hands over calls for models that others hold, and takes in those for models that this replica holds.

    A call is handed over at most once, before it has started, and counts as not started until its new replica notes
    that it runs it. Belongs to the replica's event loop.

    Args:
        starting: Entry ids of the calls that are taken and about to run; those are added of which it is asked where.
        on_change: Called when there is something to start, or room to take more.

    Attributes:
        waiting: Calls that others have handed over and that wait for room here, by their entry ids.
    """

    def __init__(
        self,
        settings: Settings,
        signer: Signer,
        queue: ReplicaQueue,
        link: Link,
        withdrawn: WithdrawnCalls,
        starting: set[bytes],
        on_change: Callable[[], None],
    ) -> None:
        self._keys = settings.keys
        self._signer = signer
        self._link = link
        self._queue = queue
        self._models = HeldModels(settings.keys, signer, queue.deployment, queue.replica)
        self._withdrawn = withdrawn
        self._starting = starting
        self._on_change = on_change
        self._shelves: list[ModelShelf] = []
        self._most: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_accepting = False
        self._holder: dict[str, str] = {}
        self.waiting: dict[bytes, _Adopted] = {}
        self._given: dict[bytes, str] = {}

    # The models of this replica

    def expect_models(self, most: int | None) -> None:
        """The code that runs here keeps so many models; None if it has no loader."""
        self._most = most

    def changed(self, shelf: ModelShelf, model_id: str) -> None:
        """A loader has taken in a model, or let go of it."""
        if shelf not in self._shelves:
            self._shelves.append(shelf)
            self._most = self._room
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._tell, [model_id])

    def accept(self) -> None:
        """Be somebody to whom calls are handed over, from now on."""
        self._loop = asyncio.get_running_loop()
        self._is_accepting = True
        self.tell_all()

    def decline(self) -> None:
        """Be nobody to whom calls are handed over, and give back those that wait here."""
        self._is_accepting = False
        self.tell_all()
        for entry in list(self.waiting):
            self._give_back(entry)

    def tell_all(self) -> None:
        """Say again which models this replica holds."""
        if self._most is not None:
            self._tell({model for shelf in self._shelves for model in shelf})

    def _tell(self, models: Iterable[str]) -> None:
        held = {model: self._is_accepting and self._holds(model) for model in models}
        if self._link.sender.is_open:
            self._models.hold(self._link.sender, held, self._room if self._is_accepting else None)

    def _holds(self, model: str) -> bool:
        return any(model in shelf for shelf in self._shelves)

    @property
    def _room(self) -> int:
        return min((shelf.room for shelf in self._shelves), default=self._most or 0)

    # Calls for the models of others

    def places(self, entry: bytes, model: str, keep: Callable[[], None], forget: Callable[[], None]) -> bool:
        """Whether it is found out first who is to run a call.

        Args:
            keep: Runs it here, which may be what comes of it.
            forget: Called if it runs elsewhere, or may do so.
        """
        if not model or self._most is None or not self._is_accepting or self._holds(model):
            return False
        self._starting.add(entry)
        self._ask(_Asked(entry, model, keep, forget, _TRIES), self._holder.get(model, ""))
        return True

    def _ask(self, asked: _Asked, other: str) -> None:
        on_answer = partial(self._answered, asked, other)
        self._models.hand_over(self._link.sender, asked.entry, other, on_answer, model=asked.model, room=self._room)

    def _answered(self, asked: _Asked, other: str, answer: Answer) -> None:
        if isinstance(answer, bytes) and asked.tries > 1:
            self._remember(asked.model, answer.decode())
            self._ask(asked._replace(tries=asked.tries - 1), answer.decode())
            return
        self._starting.discard(asked.entry)
        if answer == 1:
            asked.forget()
            self._note_given(asked.entry, other)
        elif answer == -1 or (isinstance(answer, Exception) and not _is_refusal(answer)):
            asked.forget()  # if it is still this replica's, the next link brings it again
        else:
            if isinstance(answer, Exception):
                logger.warning("could not ask which replica holds model %r: %s", asked.model, answer)
            self._holder.pop(asked.model, None)
            self._expect(asked.model)
            asked.keep()
        self._on_change()

    def _expect(self, model: str) -> None:
        """Say once more whether this replica holds a model: it is thought to from now on."""
        asyncio.get_running_loop().call_later(_LOADED_WITHIN_S, self._tell, [model])

    def _remember(self, model: str, holder: str) -> None:
        if len(self._holder) >= _REMEMBERED:
            self._holder.clear()
        self._holder[model] = holder

    def _note_given(self, entry: bytes, other: str) -> None:
        if entry in self._withdrawn:
            self._pass_on(entry, other, inherited=False)
            return
        self._given[entry] = other
        if len(self._given) > _REMEMBERED:
            del self._given[next(iter(self._given))]

    def withdraw(self, entry: bytes, *, inherited: bool) -> None:
        """The caller of a call has left: end it, or tell the replica to which it was handed over."""
        other = self._given.pop(entry, None)
        if other is None:
            self._withdrawn.withdraw(entry, inherited=inherited)
            if entry in self.waiting:
                self._on_change()
        else:
            self._pass_on(entry, other, inherited=inherited)

    def _pass_on(self, entry: bytes, other: str, *, inherited: bool) -> None:
        control = Control("cancel", entry.decode(), inherited)
        send_control(self._link.sender, self._keys, self._signer, other, control)

    # Calls that others have handed over

    def take(self, control: Control, sender: str) -> None:
        """Run a call that its sender has handed over, or given back, as soon as there is room."""
        name, _, model = control.entry.partition(" ")
        entry = name.encode()
        if entry in self.waiting or entry in self._starting:
            return
        if control.verb == "take_back":
            self._given.pop(entry, None)
            self.waiting[entry] = _Adopted("", None)
            self._on_change()
            return
        if not self._holds(model):
            self._expect(model)
        timer = asyncio.get_running_loop().call_later(_PATIENCE_S, self._give_back, entry)
        self.waiting[entry] = _Adopted(sender, timer)
        if self._is_accepting:
            self._on_change()
        else:
            self._give_back(entry)

    def start(self, room: int, begin: Callable[[Entry], None]) -> None:
        """Start so many of them; those whose callers have left need no room, as they only have to be ended."""
        unwanted = [entry for entry in self.waiting if entry in self._withdrawn]
        wanted = [entry for entry in self.waiting if entry not in self._withdrawn]
        for entry in unwanted + wanted[: max(room, 0)]:
            self._take(entry)
            self._starting.add(entry)
            spawn(self._start(entry, begin))

    async def _start(self, entry_id: bytes, begin: Callable[[Entry], None]) -> None:
        entry = None
        try:
            entry = await self._queue.adopt(self._link.sender, entry_id)
        except (BrokerUnavailable, CommandRefused) as exc:
            if _is_refusal(exc):
                logger.warning("could not start a call that was handed over, and will try again: %s", exc)
                asyncio.get_running_loop().call_later(_PATIENCE_S, self._start_later, entry_id)
                return
            # Else the next link brings it again.
        self._starting.discard(entry_id)
        if entry is not None:
            begin(entry)
        self._on_change()

    def _start_later(self, entry: bytes) -> None:
        if entry in self._starting:
            self._starting.discard(entry)
            self.waiting[entry] = _Adopted("", None)
            self._on_change()

    def forget(self, entries: Iterable[bytes]) -> None:
        """Leave some to other replicas, which have taken them."""
        for entry in entries:
            if entry in self.waiting:
                self._take(entry)

    def _take(self, entry: bytes) -> _Adopted:
        adopted = self.waiting.pop(entry)
        if adopted.timer is not None:
            adopted.timer.cancel()
        return adopted

    def _give_back(self, entry: bytes) -> None:
        sender = self.waiting[entry].sender
        if sender and self._link.sender.is_open:
            self._take(entry)
            self._starting.add(entry)
            on_answer = partial(self._given_back, entry, sender)
            self._models.give_back(self._link.sender, entry, sender, on_answer)

    def _given_back(self, entry: bytes, sender: str, answer: Answer) -> None:
        self._starting.discard(entry)
        if answer == 1:
            self._note_given(entry, sender)
        elif answer == 0 or (isinstance(answer, Exception) and _is_refusal(answer)):
            self.waiting[entry] = _Adopted("", None)  # nobody takes it back
        self._on_change()


def _is_refusal(answer: Exception) -> bool:
    """Whether what was asked has not been done, for sure, so that the call is still where it was.

    No new connection has to follow on it, which would bring the call again.
    """
    return not isinstance(answer, BrokerUnavailable) or isinstance(answer, NotTaken)
