"""Ordinary calls in a replica, those whose callers wait: from their payload to their answer."""

import asyncio
import logging
from bisect import bisect
from functools import partial
from typing import Any

from qserve.background import spawn
from qserve.broker.history.buckets import BOUNDS_MS
from qserve.broker.large.lending import Loan
from qserve.broker.link import Link
from qserve.broker.replica_queue import Entry
from qserve.broker.server.clock import RedisClock
from qserve.context import current_call
from qserve.errors import (
    CallCancelled,
    FrameRejected,
    GetTimeoutError,
    QServeError,
    ReplicaDied,
    ResultTooLarge,
    StreamBroken,
)
from qserve.failpoints import reach
from qserve.hooks import HookChain, ReplicaHook
from qserve.settings import Settings
from qserve.wire.codec import Codec
from qserve.wire.messages import (
    ERROR,
    HTTP,
    HTTP_RESPONSE,
    PYTHON,
    VALUE,
    WEBSOCKET,
    Call,
    HttpRequest,
    HttpResponse,
    Signer,
    decode_http_request,
    encode,
    pack_http,
    unpack_http,
)
from qserve.wire.parts import Payload, Source
from qserve_workers.calls.answers import Answers
from qserve_workers.calls.arrivals import borrow_payload, unpacked
from qserve_workers.calls.call_hooks import with_hooks
from qserve_workers.calls.running import Conversations, RunningCall
from qserve_workers.calls.slots import Slots
from qserve_workers.user.user_code import UserCode
from qserve_workers.user.user_entry import what_was_raised

logger = logging.getLogger(__name__)

Result = tuple[int, Payload | Loan]
"""Kind and payload of a reply."""

_UNTOLD = "the replica was stopped before the call ended; it may have run in part, so it is not run again"


class OrdinaryRuns:
    """Runs ordinary calls and answers each. Belongs to the replica's event loop."""

    def __init__(
        self,
        settings: Settings,
        signer: Signer,
        codec: Codec,
        link: Link,
        slots: Slots,
        answers: Answers,
        *,
        clock: RedisClock,
        conversations: Conversations,
        hooks: HookChain[ReplicaHook] | None,
    ) -> None:
        self._max_bytes = settings.max_value_bytes
        self._lending = answers.lending
        self._codec = codec
        self._link = link
        self._slots = slots
        self._answers = answers
        self._clock = clock
        self._conversations = conversations
        self._run_plain, self._run_told = with_hooks(self._run_user_code, hooks, clock)

    async def run(self, running: RunningCall, code: UserCode) -> None:
        """Run a call that this replica has taken: all of its outcomes."""
        entry, call = running.entry, running.call
        current_call.set(running.info)
        running.began = True
        try:
            if running.unwanted:
                raise CallCancelled("the caller left before the call ran")
            reach("run")
            run = self._run_told if call.meta else self._run_plain
            kind, result = await run(running, code)
        except asyncio.CancelledError as exc:
            if entry.id not in self._slots:
                self._slots.end_background(running)
                return  # answered, abandoned or taken over
            if running.unwanted:
                self._slots.counts.others["cancelled"] += 1
                kind, result = ERROR, self.pack_error(CallCancelled("the call was cancelled while it ran"))
            else:  # by user code, such as a task group one of whose tasks has raised what is no Exception
                kind, result = self._failure(running, exc)
        except FrameRejected as exc:
            if self._slots.give_back(running):
                spawn(self._answers.reject(entry, exc, call, self.pack_error(exc)))
            return
        except BaseException as exc:  # packing a result runs user code, too
            if isinstance(exc, StreamBroken) and _reader_has_left(running):
                self._slots.counts.others["cancelled"] += 1
                kind, result = ERROR, self.pack_error(exc)
            else:
                kind, result = self._failure(running, what_was_raised(exc))
        if not self._answer(running, kind, result):
            self._slots.end_background(running)

    def _failure(self, running: RunningCall, error: BaseException) -> Result:
        """Count and log what user code has raised, and the reply that says so."""
        call = running.call
        if not isinstance(error, Exception) or (call.kind == HTTP and not isinstance(error, QServeError)):
            place = (call.deployment, running.info.request_id)
            logger.error("Exception in deployment %r, request %s", *place, exc_info=error)
        self._slots.counts.note_failed(running, error)
        return ERROR, self.pack_error(error)

    def _answer(self, running: RunningCall, kind: int, result: Payload | Loan, *, goes_on: bool = False) -> bool:
        """Answer a call that ran; False if it has had its answer, or somebody else gives it."""
        reach("ran")
        if not self._slots.give_back(running, ran=True, goes_on=goes_on):
            if isinstance(result, Loan):
                self._lending.end(result, is_read=True)
            return False
        running.info.deadline = None  # it does not hold for tasks and threads that the call has left behind
        self._answers.add(running.entry.id, running.call, kind, result)
        return True

    def refuse(self, entry: Entry, call: Call, error: QServeError) -> None:
        """Answer a call that does not run."""
        self._answers.add(entry.id, call, ERROR, self.pack_error(error))

    def abandon(self, running: RunningCall) -> None:
        """Give up a call that outlived the shutdown: a safe one is left for others, an unsafe one is answered."""
        if self._slots.drop(running) and not self._slots.may_run_again(running.call):
            self.refuse(running.entry, running.call, ReplicaDied(_UNTOLD))

    def pack_error(self, error: BaseException) -> bytes:
        """The error as the caller gets it."""
        return encode(self._codec.pack_error(error))

    async def _run_user_code(self, running: RunningCall, code: UserCode) -> Result:
        """Kind and payload of the reply.

        Raises:
            GetTimeoutError: Its time was over; it was not run.
            FrameRejected: Its payload is not what it says.
            Exception: What user code raised.
        """
        call = running.call
        payload: bytes | Source = call.payload
        if call.out_of_line:
            views = self._slots.spec.read_only_arguments
            payload = await borrow_payload(self._lending, self._link, call, views=views)
        running.info.deadline = running.started_at + self._time_left(running.entry, call)
        if call.kind == PYTHON:
            args, kwargs = await self._arguments(payload)
            kind, result = VALUE, self._codec.pack_result(await code.call(call.method, tuple(args), kwargs))
        else:
            kind, result = await self._converse(running, code, payload)
        if len(result) <= self._answers.largest_frame:
            return kind, result
        return kind, await self._answers.prepared(result)

    async def _arguments(self, payload: bytes | Source) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if type(payload) is bytes:
            return self._codec.unpack_call(payload)
        return await unpacked(self._lending, self._codec.unpack_call, payload)  # type: ignore[arg-type]

    async def _converse(self, running: RunningCall, code: UserCode, payload: bytes | Source) -> tuple[int, Payload]:
        """Run a call whose traffic may go over its channel; its reply then says how many parts there were."""
        call = running.call
        if call.kind == HTTP:
            # Without a coroutine where nothing is awaited, as with most requests.
            request = decode_http_request(payload) if type(payload) is bytes else await self._decode_request(payload)
            self._note_id(running, request)
            response = await code.http(
                request, partial(self._conversations.open, running), partial(self._complete, running)
            )
            early = running.early
            if isinstance(early, asyncio.Task):
                await early
                return VALUE, b""  # it has its answer
            if early is not None:
                early.cancel()
            return self._reply(running, response)
        if call.kind == WEBSOCKET:
            channel = self._conversations.open(running)
            channel.greet()
            request = await self._decode_request(payload)
            self._note_id(running, request)
            await code.websocket(request, channel)
        else:
            args, kwargs = await self._arguments(payload)
            await code.stream(call.method, tuple(args), kwargs, self._conversations.open(running))
        return self._reply(running, None)

    def _reply(self, running: RunningCall, response: HttpResponse | None) -> tuple[int, Payload]:
        if response is not None:
            if response.status >= 500:
                self._slots.counts.note_failed(running, f"HTTP status {response.status}")
            return HTTP_RESPONSE, self._pack_response(response)
        return VALUE, b"%d" % (0 if running.channel is None else running.channel.sent)

    def _complete(self, running: RunningCall, response: HttpResponse | None) -> None:
        """The response of a call is known; most calls end with it."""
        assert running.task is not None
        running.early = running.task.get_loop().call_soon(self._answer_before_the_end, running, response)

    def _answer_before_the_end(self, running: RunningCall, response: HttpResponse | None) -> None:
        """Answer a call whose code goes on after its response with background tasks, which may outlive its deadline."""
        if running.entry.id not in self._slots:
            return
        running.info.deadline = None
        try:
            kind, packed = self._reply(running, response)
        except ResultTooLarge as exc:
            kind, packed = ERROR, self.pack_error(exc)
        if len(packed) <= self._answers.largest_frame:
            self._answer(running, kind, packed, goes_on=True)
        else:
            running.early = spawn(self._answer_large(running, kind, packed))

    async def _answer_large(self, running: RunningCall, kind: int, packed: Payload) -> None:
        result: Payload | Loan
        try:
            result = await self._answers.prepared(packed)
        except ResultTooLarge as exc:
            kind, result = ERROR, self.pack_error(exc)
        self._answer(running, kind, result, goes_on=True)

    async def _decode_request(self, payload: bytes | Source) -> HttpRequest:
        if isinstance(payload, bytes):
            return decode_http_request(payload)
        return await unpacked(self._lending, partial(unpack_http, decode_http_request), payload)

    @staticmethod
    def _note_id(running: RunningCall, request: HttpRequest) -> None:
        """In logs and for the user's code a request has the id that its client knows."""
        running.info.request_id = request.request_id or running.call.id

    def _time_left(self, entry: Entry, call: Call) -> float:
        """Seconds until a call's deadline; raises where it is over."""
        waited_ms = self._clock.age_ms(entry.time_ms)
        counts = self._slots.counts
        counts.waits[bisect(BOUNDS_MS, waited_ms)] += 1
        counts.waited_ms += waited_ms
        left_ms = call.ttl_ms - waited_ms
        if left_ms < 0:
            raise GetTimeoutError("the deadline passed before a replica was free; the call was not run")
        return left_ms / 1000

    def _pack_response(self, response: HttpResponse) -> Payload:
        if len(response.body) > self._max_bytes:
            raise ResultTooLarge(
                f"the response has {len(response.body):,} bytes, and the limit is {self._max_bytes:,}: "
                "stream it, or raise QSERVE_MAX_VALUE_BYTES"
            )
        return pack_http(response, self._answers.largest_frame)


def _reader_has_left(running: RunningCall) -> bool:
    """Whether what a call sends is not wanted any more, and its code has ended without an error of its own."""
    has_left = running.unwanted or (running.channel is not None and running.channel.is_unwanted)
    return has_left and running.info.app_error is None
