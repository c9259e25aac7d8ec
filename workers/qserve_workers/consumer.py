"""Takes calls from a deployment's queue, runs them, and answers each exactly once."""

import asyncio
import logging
import time
from collections import deque
from functools import partial
from typing import Protocol

import hiredis
import msgspec

from qserve.background import end, spawn
from qserve.codec import Codec
from qserve.connection import Answer
from qserve.context import CallInfo, current_call
from qserve.errors import (
    CallCancelled,
    FrameRejected,
    GetTimeoutError,
    PayloadTooLarge,
    PoisonCall,
    QServeError,
    ReplicaDied,
    ResultNotSerializable,
    ResultTooLarge,
    ValueNotSerializable,
)
from qserve.keys import Keys
from qserve.link import BLOCK_MS, Link
from qserve.messages import (
    ERROR,
    HTTP,
    HTTP_RESPONSE,
    VALUE,
    Blob,
    Call,
    HttpRequest,
    HttpResponse,
    Reply,
    Signer,
    decode_blob,
    decode_call,
    decode_http_request,
    encode,
)
from qserve.queues import Entry, ReplicaQueue
from qserve.settings import Settings
from qserve.spec import DeploymentSpec
from qserve_workers.clock import SAMPLE_EVERY_S, RedisClock

logger = logging.getLogger(__name__)

_RESULT_TTL_MS = 60_000
_UNTOLD = "the replica was stopped before the call ended; it may have run in part, so it is not run again"


class Code(Protocol):
    """User code as the consumer sees it."""

    @property
    def only_sync(self) -> bool: ...
    def needs_thread(self, method: str) -> bool: ...
    async def call(self, method: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object: ...
    async def http(self, request: HttpRequest) -> HttpResponse: ...


class RunningCall:
    """A call between its arrival and its answer."""

    __slots__ = ("call", "entry", "needs_thread", "started_at", "task")

    def __init__(self, entry: Entry, call: Call, needs_thread: bool) -> None:
        self.entry = entry
        self.call = call
        self.needs_thread = needs_thread
        self.started_at = time.monotonic()
        self.task: asyncio.Task[None] | None = None


class Consumer:
    """One replica's share of its deployment's calls. Belongs to the replica's event loop.

    A call taken before its replica died comes here a second time only if it is safe to run again, then runs alone, and
    after `max_deliveries` goes to the dead letters.
    """

    def __init__(self, settings: Settings, signer: Signer, codec: Codec, spec: DeploymentSpec, replica: str) -> None:
        self.spec = spec
        self.handled = 0
        self.run_times_ms: deque[float] = deque(maxlen=512)
        self.queue = ReplicaQueue(settings.keys, spec.name, replica)
        self._settings = settings
        self._keys: Keys = settings.keys
        self._signer = signer
        self._codec = codec
        self._clock = RedisClock()
        self._link = Link(settings.redis_url, self._link_up)
        self._code: Code
        self._running: dict[bytes, RunningCall] = {}
        self._on_thread = 0
        self._suspects: deque[Entry] = deque()
        self._accepting = False
        self._reading = False
        self._waiter_id = 0
        self._replies: dict[str, list[tuple[bytes, bytes]]] = {}
        self._idle = asyncio.Event()
        self._read_ended = asyncio.Event()
        self._clockwork: asyncio.Task[None] | None = None

    # Life cycle

    async def connect(self) -> None:
        """Open the queue without taking anything from it."""
        await self._link.start()
        self._clockwork = spawn(self._sample_clock())

    def start(self, code: Code) -> None:
        """Begin, or go on, to take calls."""
        self._code = code
        self._accepting = True
        self._read_more()

    async def pause(self) -> None:
        """Take no more calls; returns when none is being read any more."""
        self._accepting = False
        while self._reading and self._link.sender is not None:
            self._read_ended.clear()
            # Ends the blocking read on the server, where an entry is either delivered whole or not at all.
            self._link.sender.send_now(_ignore, "CLIENT", "UNBLOCK", self._waiter_id)
            await self._read_ended.wait()

    async def finish(self, timeout_s: float) -> bool:
        """Wait until every call taken is answered; False if some are not within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._running or self._suspects:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def finish_queue(self, timeout_s: float) -> bool:
        """Answer what is queued as well, taking calls until none is left."""
        try:
            async with asyncio.timeout(timeout_s):
                while await self._queue_length():  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Answer what never ended, and disconnect."""
        for running in list(self._running.values()):
            self._abandon(running)
        self._flush_replies()
        await end(self._clockwork)
        if self._link.sender is not None:
            await self._link.sender.call("PING")  # the replies before it have arrived
        await self._link.stop()

    @property
    def link(self) -> Link:
        """The connections, for whoever takes over calls on behalf of this replica."""
        return self._link

    @property
    def running(self) -> int:
        """How many calls are taken and not answered."""
        return len(self._running)

    @property
    def entries(self) -> list[bytes]:
        """Entry ids of the calls that are taken and not answered."""
        return list(self._running)

    async def _link_up(self) -> None:
        sender, waiter = self._link.sender, self._link.waiter
        assert sender is not None
        assert waiter is not None
        await self.queue.open(sender)
        self._waiter_id = await waiter.call("CLIENT", "ID")
        await self._clock.sample(sender)
        if self._link.losses:
            # A batch delivered into the dying connection is ours, but never arrived.
            for entry in await self.queue.history(sender):
                if entry.id not in self._running:
                    self._begin(entry)
        self._flush_replies()
        self._read_more()

    async def _sample_clock(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_EVERY_S)
            if self._link.is_silent() and self._reading:
                self._link.lose()
            elif self._link.sender is not None:
                try:
                    await self._clock.sample(self._link.sender)
                except QServeError as exc:
                    logger.debug("could not read Redis' clock: %s", exc)

    async def _queue_length(self) -> int:
        if self._link.sender is None:
            return 1
        length: int = await self._link.sender.call("XLEN", self._keys.calls(self.spec.name))
        return length

    # Taking calls

    def _read_more(self) -> None:
        waiter = self._link.waiter
        if self._reading or waiter is None or not self._accepting:
            return
        if self._suspects:
            if not self._running:
                self._begin(self._suspects.popleft(), alone=True)
            return
        room = self._room()
        if room > 0:
            self._reading = True
            self.queue.read(waiter, self._arrived, most=room, block_ms=BLOCK_MS)

    def _room(self) -> int:
        running = len(self._running)
        free = self.spec.max_concurrent_queries - running
        if self._code.only_sync:
            return min(free, self.spec.max_threads - running)
        if self._on_thread > self.spec.max_threads:
            return 0  # a call waits for the thread: leave the next one to a replica that is free
        return min(free, 1 + running)  # a burst spreads over the replicas instead of filling the first

    def _arrived(self, answer: Answer) -> None:
        self._reading = False
        self._read_ended.set()
        if isinstance(answer, Exception):
            if isinstance(answer, hiredis.ReplyError):
                self._read_failed(answer)
            return
        self._link.heard()
        for entry in self.queue.entries(answer):
            self._begin(entry)
        self._read_more()

    def _read_failed(self, error: Exception) -> None:
        # NOGROUP: the stream is gone. After a deletion that is as it should be; else the link makes it again.
        if self._accepting:
            logger.warning("reading the queue of %s failed: %s", self.spec.name, error)
            asyncio.get_running_loop().call_later(0.2, self._link.lose)

    def take_over(self, entries: list[Entry]) -> None:
        """Decide on entries taken from a replica that is gone."""
        for entry in entries:
            if entry.id not in self._running:
                self._begin(entry)
        self._read_more()

    def _begin(self, entry: Entry, *, alone: bool = False) -> None:
        try:
            call = decode_call(self._signer.open(entry.frame))
            if call.deployment != self.spec.name:
                raise FrameRejected(f"a call to {call.deployment!r}")
        except (FrameRejected, msgspec.DecodeError) as exc:
            spawn(self._reject(entry, exc))
            return
        if entry.deliveries > 1 and not alone and not self._may_rerun(entry, call):
            return
        running = RunningCall(entry, call, self._accepting and self._code.needs_thread(call.method))
        self._running[entry.id] = running
        self._on_thread += running.needs_thread
        running.task = asyncio.create_task(self._run(running))

    def _may_rerun(self, entry: Entry, call: Call) -> bool:
        """Settle a call whose replica died; safe ones wait here until they can run alone. Always False."""
        if not (call.safe or self.spec.idempotent):
            error: QServeError = ReplicaDied(
                f"a replica of {self.spec.name!r} died while it had the call; it may have run, so it is not run again"
            )
            self._answer(entry.id, call, ERROR, encode(self._codec.pack_error(error)))
        elif entry.deliveries > self._settings.max_deliveries:
            spawn(self._bury(entry, call))
        else:
            self._suspects.append(entry)
        return False

    # Running a call: all of its outcomes

    async def _run(self, running: RunningCall) -> None:
        entry, call = running.entry, running.call
        current_call.set(CallInfo(call.id, entry.deliveries))
        try:
            payload = call.payload if not call.out_of_line else await self._fetch(call)
            if self._clock.age_ms(entry.time_ms) > call.ttl_ms:
                raise GetTimeoutError("the deadline passed before a replica was free; the call was not run")
            if call.kind == HTTP:
                response = await self._code.http(decode_http_request(payload))
                kind, result = HTTP_RESPONSE, self._pack_response(response)
            else:
                args, kwargs = self._codec.unpack_call(payload)
                value = await self._code.call(call.method, tuple(args), kwargs)
                kind, result = VALUE, self._pack_result(value)
        except asyncio.CancelledError:
            if entry.id not in self._running:
                return  # abandoned or taken over: somebody else answers
            kind, result = ERROR, self._pack_error(CallCancelled("the call was cancelled while it ran"))
        except Exception as exc:
            if call.kind == HTTP and not isinstance(exc, QServeError):
                logger.exception("Exception in deployment %r, request %s", self.spec.name, call.id)
            kind, result = ERROR, self._pack_error(exc)
        if self._forget(running):
            self._answer(entry.id, call, kind, result)
        self._read_more()

    def _forget(self, running: RunningCall) -> bool:
        if self._running.pop(running.entry.id, None) is None:
            return False
        self._on_thread -= running.needs_thread
        self.handled += 1
        self.run_times_ms.append((time.monotonic() - running.started_at) * 1000)
        if not self._running:
            self._idle.set()
        return True

    def _pack_result(self, value: object) -> bytes:
        try:
            return self._codec.pack(value, "the result")
        except PayloadTooLarge as exc:
            raise ResultTooLarge(str(exc)) from exc
        except ValueNotSerializable as exc:
            raise ResultNotSerializable(str(exc)) from exc

    def _pack_response(self, response: HttpResponse) -> bytes:
        if len(response.body) > self._settings.max_value_bytes:
            most = self._settings.max_value_bytes
            raise ResultTooLarge(f"the response has {len(response.body)} bytes, {most} may travel")
        return encode(response)

    def _pack_error(self, error: BaseException) -> bytes:
        return encode(self._codec.pack_error(error))

    async def _fetch(self, call: Call) -> bytes:
        if self._link.sender is None:
            raise QServeError("Redis is away")
        sealed = await self._link.sender.call("GET", self._keys.payload(call.id))
        if sealed is None:
            raise GetTimeoutError("the call's payload has expired; it was not run")
        blob = decode_blob(self._signer.open(sealed))
        if blob.id != call.id:
            raise FrameRejected("a payload of another call")
        return blob.data

    def cancel(self, entry: bytes) -> None:
        """Stop a running call, on its caller's word; only one that is safe to leave half done, and not on a thread."""
        running = self._running.get(entry)
        if running is None or running.task is None or running.needs_thread:
            return
        if running.call.safe or self.spec.idempotent:
            running.task.cancel()

    def lost(self, entries: list[bytes]) -> None:
        """Forget calls that others have taken over while this replica was thought dead."""
        for entry in entries:
            running = self._running.get(entry)
            if running is not None:
                self._drop(running)

    def _abandon(self, running: RunningCall) -> None:
        """Give up a call that outlived the shutdown: a safe one is left for others, an unsafe one is answered."""
        call = running.call
        self._drop(running)
        if not (call.safe or self.spec.idempotent):
            self._answer(running.entry.id, call, ERROR, self._pack_error(ReplicaDied(_UNTOLD)))

    def _drop(self, running: RunningCall) -> None:
        self._running.pop(running.entry.id, None)
        self._on_thread -= running.needs_thread
        if running.task is not None:
            running.task.cancel()

    # Answering

    def _answer(self, entry: bytes, call: Call, kind: int, payload: bytes) -> None:
        out_of_line = len(payload) > self._settings.out_of_line_bytes
        sender = self._link.sender
        if out_of_line and sender is not None:
            reply_id = f"{call.id}:r"
            sealed = self._signer.seal(encode(Blob(call.id, payload)))
            sender.send(_ignore, "SET", self._keys.payload(reply_id), sealed, "PX", _RESULT_TTL_MS)
            payload = b""
        if call.out_of_line and sender is not None:
            sender.send(_ignore, "DEL", self._keys.payload(call.id))
        frame = self._signer.seal(encode(Reply(call.id, call.reply_to, kind, payload, out_of_line)))
        replies = self._replies.get(call.reply_to)
        if replies is not None:
            replies.append((entry, frame))
            return
        if not self._replies:
            asyncio.get_running_loop().call_soon(self._flush_replies)
        self._replies[call.reply_to] = [(entry, frame)]

    def _flush_replies(self) -> None:
        sender = self._link.sender
        if not self._replies or sender is None:
            return  # while Redis is away they are kept: the next link sends them
        replies, self._replies = self._replies, {}
        for caller, pairs in replies.items():
            self.queue.reply(sender, caller, pairs, partial(self._replied, len(pairs)))
        sender.flush()

    def _replied(self, count: int, answer: Answer) -> None:
        if isinstance(answer, int) and answer < count:
            logger.warning("%d late results of %s were dropped: others had answered", count - answer, self.spec.name)
            self._count("late_results", count - answer)
        elif isinstance(answer, hiredis.ReplyError):
            logger.error("Redis refused %d replies of %s: %s", count, self.spec.name, answer)

    async def _reject(self, entry: Entry, error: Exception) -> None:
        logger.warning("rejected a frame in the queue of %s: %s", self.spec.name, error)
        self._count("rejected_frames", 1)
        if self._link.sender is not None:
            await self.queue.give_up(self._link.sender, entry.id, f"rejected: {error}", "", b"")

    async def _bury(self, entry: Entry, call: Call) -> None:
        retries = self._settings.max_deliveries - 1
        reason = f"Task failed with {retries} retries: every replica of {self.spec.name!r} that had the call died"
        frame = self._signer.seal(encode(Reply(call.id, call.reply_to, ERROR, self._pack_error(PoisonCall(reason)))))
        self._count("dead_letters", 1)
        if self._link.sender is not None:
            await self.queue.give_up(self._link.sender, entry.id, reason, call.reply_to, frame)

    def _count(self, metric: str, by: int) -> None:
        if self._link.sender is not None:
            self._link.sender.send(_ignore, "HINCRBY", self._keys.counters, metric, by)


def _ignore(_answer: Answer) -> None:
    """For commands whose failure shows elsewhere."""
