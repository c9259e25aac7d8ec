"""What a replica makes of what stands in its queue: a call of its deployment that nobody has run, or none of ours."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from qserve.broker.claims import send_claims
from qserve.broker.connection import Answer
from qserve.broker.large.lending import Lending
from qserve.broker.link import Link
from qserve.broker.payloads import Payloads
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.replica_queue import Entry
from qserve.errors import BrokerUnavailable, FrameRejected, GetTimeoutError
from qserve.failpoints import reach
from qserve.settings import Settings
from qserve.values.borrowing import ValueGone
from qserve.wire.call_record import decode_durable_call
from qserve.wire.messages import Call, Signer, decode_call
from qserve.wire.parts import Source

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NEXT_TRY_S = 0.2
_REMEMBERED = 8192
"""Of how many calls a replica knows at least that it has seen them."""
OnClaimed = Callable[[bool | BrokerUnavailable], None]


class Arrivals:
    """Opens entries and claims calls. Belongs to the replica's event loop.

    A frame that is put again has another entry: this replica knows it from the last calls it has seen, and all replicas
    from the claims in Redis, one bit for each unsafe call, kept for twice its time.
    """

    def __init__(self, settings: Settings, signer: Signer, deployment: str, link: Link) -> None:
        self._keys = settings.keys
        self._signer = signer
        self._deployment = deployment
        self._link = link
        self.claims = signer.signs and settings.refuse_replays
        """Whether ordinary calls that may not run twice have to be claimed before they run."""
        self._recent: dict[str, bytes] = {}
        self._less_recent: dict[str, bytes] = {}
        self._collected: list[tuple[Call, OnClaimed]] = []

    def open(self, entry: Entry) -> tuple[Call, bool]:
        """The call of an entry, and whether this replica was given this very entry before.

        Raises:
            FrameRejected: It is none of ours, or not of this deployment, or stands in another entry, too.
        """
        body = self._signer.open(entry.frame)
        call = decode_durable_call(body) if entry.durable else decode_call(body)
        if call.deployment != self._deployment:
            raise FrameRejected(f"a call to {call.deployment!r}")
        if entry.durable:
            if call.id.encode() != entry.call:
                raise FrameRejected("a durable call under the id of another")
            return call, False
        if not call.reply_to:
            raise FrameRejected("a durable call that says it is none")
        first = self._seen(call.id, entry.id)
        if first not in (None, entry.id):
            raise FrameRejected("a call that was put before")
        return call, first is not None

    def forget(self, call_id: str) -> None:
        """A call that was given to another replica, before it was run here."""
        self._recent.pop(call_id, None)
        self._less_recent.pop(call_id, None)

    def claim(self, call: Call, on_claimed: OnClaimed) -> None:
        """Claim a call together with the others of this tick; `on_claimed` gets whether it is the first claim."""
        if not self._collected:
            asyncio.get_running_loop().call_soon(self._flush)
        self._collected.append((call, on_claimed))

    def _flush(self) -> None:
        collected, self._collected = self._collected, []
        calls = [(call.id, call.ttl_ms) for call, _ in collected]
        send_claims(self._link.sender, self._keys, calls, partial(self._claimed, collected))
        self._link.sender.flush()

    @staticmethod
    def _claimed(collected: list[tuple[Call, OnClaimed]], answer: Answer) -> None:
        if isinstance(answer, Exception):
            error = BrokerUnavailable(f"Redis did not confirm that the call may run; it was not run: {answer}")
            for _, on_claimed in collected:
                on_claimed(error)
            return
        for (_, on_claimed), first in zip(collected, answer, strict=True):
            on_claimed(first == 1)

    def _seen(self, call_id: str, entry: bytes) -> bytes | None:
        """The entry of a call that this replica has seen before, if any: a frame replayed on the queue has another."""
        first = self._recent.get(call_id) or self._less_recent.get(call_id)
        if first is not None:
            return first
        if len(self._recent) >= _REMEMBERED:
            self._recent, self._less_recent = {}, self._recent
        self._recent[call_id] = entry
        return None


async def fetch_payload(payloads: Payloads, link: Link, call: Call, is_wanted: Callable[[], bool]) -> bytes:
    """The payload of a durable call that travelled out of line; waits as long as Redis cannot be asked for it.

    Raises:
        CancelledError: The call is not wanted any more.
        GetTimeoutError: It has expired.
    """
    while is_wanted():
        try:
            payload = await payloads.fetch(link.sender, call.id)
        except (BrokerUnavailable, CommandRefused) as exc:
            logger.warning("could not fetch the large arguments of call %s: %s", call.id, exc)
            await asyncio.sleep(_NEXT_TRY_S)
            continue
        if payload is None:
            raise GetTimeoutError("the call's payload has expired; it was not run")
        return _fetched(payload)
    raise asyncio.CancelledError


async def borrow_payload(lending: Lending, link: Link, call: Call, *, views: bool) -> Source:
    """The large payload of an ordinary call, which its caller has.

    Raises:
        BrokerUnavailable: It is gone, or has to be sent and did not arrive.
        FrameRejected: It is not what the call says.
    """
    with payload_is_there():
        return _fetched(await lending.borrow(link.sender, call.payload, returns=False, views=views))


def _fetched(payload: T) -> T:
    reach("payload-fetched")
    return payload


@contextlib.contextmanager
def payload_is_there() -> Iterator[None]:
    """Within the block, what is gone ends the call: mostly nobody waits for it any more."""
    try:
        yield
    except ValueGone as exc:
        raise BrokerUnavailable(f"the call was not run: {exc}") from exc


async def unpacked(lending: Lending, unpack: Callable[[Source], T], source: Source) -> T:
    """What a large payload holds, taken out on a thread if that takes long."""
    with payload_is_there():
        return await lending.aside(partial(unpack, source), len(source))
