"""What a process lends to others, and how it gets what they have lent: opened on the same host, else sent."""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar, cast
from weakref import WeakValueDictionary

from qserve.broker.connection import Connection
from qserve.broker.counters import count
from qserve.broker.keys import Keys
from qserve.broker.large.transfers import TransferBroken, Transfers
from qserve.broker.redis_errors import CommandRefused
from qserve.errors import BrokerUnavailable, FrameRejected
from qserve.this_machine import this_host
from qserve.values.borrowing import Borrowed, Borrowing, NotReachable, ValueGone, numbered
from qserve.values.segments import COPIED, HELD, LENT, Segment, SegmentPool, place_of
from qserve.wire.messages import Lent, Signer, decode_lent, encode
from qserve.wire.parts import Part, Parts, Payload, Source, size_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

RESULT_TTL_S = 60.0
"""How long a result is kept for a caller that does not fetch it."""
ON_THE_LOOP = 4 * 2**20
"""What is larger than so many bytes is copied on a thread, so that no event loop waits for it."""
_LAST_WORD_S = 5.0
_SENT_AT_ONCE = _RECEIVED_AT_ONCE = 8


class Loan:
    """A value that this process lends: a segment, and which of its contents."""

    __slots__ = ("frame", "generation", "passed", "segment", "sendings", "since", "sizes")

    def __init__(self, segment: Segment, frame: bytes, sizes: Sequence[int], passed: Sequence[Borrowed] = ()) -> None:
        self.segment = segment
        self.generation = segment.generation
        self.frame = frame
        self.sizes = sizes
        self.passed = passed
        """Values of other processes that it refers to, and whose memory this process keeps meanwhile."""
        self.sendings = 0
        """To how many processes it is being sent, or will be once a thread is free."""
        self.since = time.monotonic()

    def __len__(self) -> int:
        return sum(self.sizes) + sum(map(len, self.passed))

    def parts(self) -> list[memoryview]:
        """The parts of the value."""
        places, _ = place_of(self.sizes)
        return [self.segment.read(at, size) for at, size in zip(places, self.sizes, strict=True)]


class Sent:
    """What another process has sent, as the source of a value; see `qserve.wire.parts.Source`."""

    def __init__(self, parts: list[memoryview]) -> None:
        self._parts = parts
        self._size = sum(map(len, parts))
        self._passed: Sequence[Source] = ()

    def __len__(self) -> int:
        return self._size

    @property
    def head(self) -> bytes:
        return bytes(self._parts[0])

    def take_bytes(self, number: int) -> bytes:
        return bytes(self.take(number))

    def take(self, number: int, *, writable: bool = False) -> memoryview:
        if not 0 < number < len(self._parts):
            raise FrameRejected(f"a value that refers to buffer {number} of {len(self._parts) - 1}")
        return self._parts[number]

    def size_of(self, number: int) -> int:
        return len(self._parts[number]) if number < len(self._parts) else 0

    def view(self, number: int) -> memoryview:
        return self.take(number)

    def refer_to(self, passed: Sequence[Source]) -> None:
        """Note the values of other processes that it refers to."""
        self._passed = passed

    def passed_on(self, number: int) -> Source:
        return numbered(self._passed, number)

    def finish(self) -> None:
        """Nothing to tell."""

    hold = keep = drop = finish


Arrived = Borrowed | Sent
"""A large payload that has come from another process."""


class Lending:
    """The large values of one process on their way to others, and those of others on their way here.

    Args:
        process: Id of this process, whose inbox is asked to send what cannot be opened.
        url: Of the Redis through which they are sent.
    """

    def __init__(self, process: str, url: str, keys: Keys, signer: Signer) -> None:
        self._process = process
        self._keys = keys
        self._pool = SegmentPool(self._aside)
        self._borrowing = Borrowing()
        self._transfers = Transfers(url, keys, signer)
        self._lock = threading.Lock()
        self._stopped = False
        self._lent: dict[bytes, Loan] = {}
        self._passed: WeakValueDictionary[bytes, Borrowed] = WeakValueDictionary()
        self._results: deque[Loan] = deque()
        self._copying = ThreadPoolExecutor(2, thread_name_prefix="qserve-copying")
        self._freeing = ThreadPoolExecutor(1, thread_name_prefix="qserve-freeing")
        self._sending = ThreadPoolExecutor(_SENT_AT_ONCE, thread_name_prefix="qserve-sending")
        # Others than those that send: two processes that send to each other would each wait for the other to receive.
        self._receiving = ThreadPoolExecutor(_RECEIVED_AT_ONCE, thread_name_prefix="qserve-receiving")

    # Lending

    def lend(self, payload: Payload) -> Loan:
        """Copy a payload to where others can read it. From any thread.

        Raises:
            PayloadTooLarge: There is not so much memory.
        """
        parts: Sequence[Part] = payload.parts if isinstance(payload, Parts) else (payload,)
        sizes = [size_of(part) for part in parts]
        segment, places = self.reserve(sizes)
        for at, part in zip(places, parts, strict=True):
            segment.write(at, part)
        passed = payload.passed if isinstance(payload, Parts) else ()
        return self.publish(segment, sizes, cast("Sequence[Borrowed]", passed))

    def reserve(self, sizes: Sequence[int]) -> tuple[Segment, list[int]]:
        """A segment for parts of these sizes, and where each of them belongs; raises like `lend`."""
        self._collect()
        places, size = place_of(sizes)
        return self._pool.take(size), places

    def publish(self, segment: Segment, sizes: Sequence[int], passed: Sequence[Borrowed] = ()) -> Loan:
        """Lend what has been written into a segment, together with values of other processes that it refers to."""
        others = [value.lent_by(self._process) for value in passed]
        loan = Loan(segment, encode(segment.lent(self._process, this_host(), sizes, others)), sizes, passed)
        with self._lock:
            self._lent[segment.cookie] = loan
            for lent, value in zip(others, passed, strict=True):
                self._passed[lent.cookie] = value
        return loan

    def abandon(self, segment: Segment) -> None:
        """Take back a segment that was never lent."""
        self._pool.give_back(segment)

    def end(self, loan: Loan, *, is_read: bool) -> None:
        """End a loan.

        Args:
            is_read: Nobody reads it any more. Else its memory is given up, because somebody may.
        """
        with self._lock:
            if self._lent.pop(loan.segment.cookie, None) is None:
                return
        passed, loan.passed = loan.passed, ()
        if is_read:
            self._pool.give_back(loan.segment)
            return
        self._pool.discard(loan.segment)
        for value in passed:
            value.keep()

    def lend_result(self, payload: Payload) -> Loan:
        """Like `lend`; the loan ends by itself when it has been copied out, or after RESULT_TTL_S."""
        loan = self.lend(payload)
        with self._lock:
            self._results.append(loan)
        return loan

    def _collect(self) -> None:
        """End the loans of results that have been fetched, or will not be."""
        if not self._results:
            return
        before = time.monotonic() - RESULT_TTL_S
        with self._lock:
            results, self._results = self._results, deque()
        kept = []
        for loan in results:
            state = loan.segment.state
            if state in (LENT, HELD) and (loan.since > before or loan.sendings):
                kept.append(loan)
            else:
                self.end(loan, is_read=state == COPIED)
        with self._lock:
            self._results.extend(kept)

    def tick(self) -> None:
        """Give up memory that is not used; to be called every second."""
        self._collect()
        self._pool.trim()
        if not self._borrowing.is_empty:
            self._aside(self._borrowing.trim)

    async def drained(self) -> None:
        """Wait until all results have been fetched, for a few seconds at most."""
        end = time.monotonic() + _LAST_WORD_S
        self._collect()
        while any(loan.segment.state == LENT for loan in self._results) and time.monotonic() < end:
            await asyncio.sleep(0.02)
            self._collect()

    def stop(self) -> None:
        """Give up everything."""
        self._stopped = True
        with self._lock:
            lent, self._lent = self._lent, {}
            self._results.clear()
        for loan in lent.values():
            loan.segment.close()
        for threads in (self._copying, self._sending, self._receiving):
            threads.shutdown(wait=False, cancel_futures=True)
        self._freeing.shutdown(wait=False)  # it does what it has to
        self._pool.close()
        self._borrowing.close()

    # What others ask for

    def send(self, name: str, wanted: str) -> None:
        """Send what was lent to a process that cannot open it, on a thread.

        Args:
            name: Of the transfer.
            wanted: Cookie and number of the content.
        """
        known, _, generation = wanted.partition(":")
        cookie = bytes.fromhex(known)
        with self._lock:
            found = self._lent.get(cookie) or self._passed.get(cookie)
            if found is not None and str(found.generation) != generation:
                found = None
            if isinstance(found, Loan):
                found.sendings += 1
        self._sending.submit(self._send, name, found)

    def _send(self, name: str, value: Loan | Borrowed | None) -> None:
        try:
            if value is None:
                self._transfers.refuse(name)
            elif isinstance(value, Borrowed):
                self._transfers.send(name, value.parts(), value.is_there)
            else:
                self._send_own(name, value)
        except (BrokerUnavailable, CommandRefused, TransferBroken, ValueError) as exc:
            logger.warning("a large value could not be sent: %s", exc)

    def _send_own(self, name: str, loan: Loan) -> None:
        try:
            self._transfers.send(name, loan.parts(), lambda: self._lent.get(loan.segment.cookie) is loan)
            with self._lock:
                if self._lent.get(loan.segment.cookie) is loan:
                    loan.segment.note_copied()
        finally:
            with self._lock:
                loan.sendings -= 1

    # Borrowing

    async def borrow(self, sender: Connection, frame: bytes, *, returns: bool, views: bool = False) -> Arrived:
        """What another process has lent.

        Args:
            sender: The connection for counting it.
            frame: What its message says of it.
            returns: Tell the lender when it has been copied out: nobody else reads it.
            views: Give read-only views of the lender's memory instead of copies, where it can be opened.

        Raises:
            ValueGone: It is there no more.
            FrameRejected: It is not what it says.
            BrokerUnavailable: It has to be sent, and Redis cannot be reached.
        """
        lent = decode_lent(frame)
        found = await self._borrow(sender, lent, returns=returns, views=views)
        if lent.passed:
            count(sender, self._keys, "values_passed_on", len(lent.passed))
            found.refer_to([await self._borrow(sender, each, returns=False, views=views) for each in lent.passed])
        return found

    async def _borrow(self, sender: Connection, lent: Lent, *, returns: bool, views: bool) -> Arrived:
        try:
            found = self._borrowing.open(lent, returns=returns, views=views)
            count(sender, self._keys, "values_lent")
            return found
        except NotReachable:
            return await self._receive(sender, lent)

    async def _receive(self, sender: Connection, lent: Lent) -> Sent:
        loop = asyncio.get_running_loop()
        given_up = threading.Event()
        fetch = partial(self._transfers.fetch, lent, lambda: not (given_up.is_set() or self._stopped))
        try:
            parts = await loop.run_in_executor(self._receiving, fetch)
        except TransferBroken as exc:
            raise ValueGone(str(exc)) from exc
        except CommandRefused as exc:
            raise BrokerUnavailable(f"Redis refused to pass a large value on: {exc}") from exc
        finally:
            given_up.set()
        count(sender, self._keys, "values_sent")
        return Sent(parts)

    def give_up(self, frame: bytes) -> None:
        """Tell the lender of a result that nobody wants it."""
        with contextlib.suppress(NotReachable, ValueGone, FrameRejected):  # else it ends by itself
            self._borrowing.open(decode_lent(frame), returns=True).drop()

    # Threads

    def run(self, work: Callable[[], None]) -> None:
        """Do something that copies a large value on a thread."""
        self._copying.submit(work)

    def _aside(self, work: Callable[[], None]) -> None:
        """Give up memory on a thread: that takes a fifth of a millisecond for each MiB."""
        try:
            self._freeing.submit(work)
        except RuntimeError:  # it has ended, as this process stops
            work()

    async def aside(self, work: Callable[[], T], size: int) -> T:
        """Do something that copies so many bytes, on a thread if that takes long."""
        if size <= ON_THE_LOOP:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._copying, work)
