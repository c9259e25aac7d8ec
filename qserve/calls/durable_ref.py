"""References to durable calls: results that any process can ask for, now or later."""

import asyncio
from asyncio import wrap_future
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from qserve.background import spawn
from qserve.calls.client import Client
from qserve.calls.ref import Ref
from qserve.durable.watching import CallWatcher
from qserve.errors import CallNotFound, QServeError, StreamBroken
from qserve.wire.call_record import ENDS, CallRecord, DurableOptions, Part, is_call_id
from qserve.wire.codec import Codec
from qserve.wire.messages import (
    ERROR,
    HTTP_RESPONSE,
    PYTHON,
    HttpResponse,
    LargeReply,
    Outcome,
    Reply,
    decode_error,
    decode_http_response,
    unpack_http,
)
from qserve.wire.parts import flat

if TYPE_CHECKING:
    from starlette.responses import Response

T = TypeVar("T")
_LOOK_AGAIN_S = 10.0
"""How often to look for parts without having been told of one, since news may be lost with a connection."""


class CallStatus(NamedTuple):
    """How a durable call is doing.

    Attributes:
        state: "scheduled", "queued", "running", or how it ended: "done", "failed", "cancelled", "dead" or "expired".
        attempts: How often it was started.
        position: How many calls are before it in the queue, at least; None unless it is queued.
        submitted, started, ended, due: Unix times on Redis' clock.
        error: Text of the last error, also of one after which it is tried again.
    """

    id: str
    state: str
    deployment: str
    method: str
    attempts: int
    position: int | None
    submitted: float
    started: float | None
    ended: float | None
    due: float | None
    error: str


class DurableRef(Ref[T]):
    """The result of a durable call. Its `id` is all that another process needs for `serve.get_ref(id)`.

    `result()` waits as long as it takes, unless it is given a timeout.
    """

    def __init__(self, client: Client, codec: Codec, call_id: str, label: str) -> None:
        super().__init__()
        self._client = client
        self._codec = codec
        self._id = call_id
        self._label = label
        self._progress: object = None
        self._news: set[asyncio.Event] = set()
        self._watcher = CallWatcher(self._settle, self._take_progress, self._wake)

    @property
    def id(self) -> str:
        """The id of the call. Whoever knows it may see the result and cancel the call."""
        return self._id

    @property
    def label(self) -> str:
        """The name of what is called, for messages."""
        return self._label

    def progress(self) -> Any:
        """What the call has reported last with `report_progress`; None if it has reported nothing yet."""
        return self._progress

    def status(self) -> CallStatus:
        """Ask Redis how the call is doing.

        Raises:
            CallNotFound: It ended so long ago that it is forgotten.
            BrokerUnavailable: Redis cannot be asked.
            RuntimeError: Called where waiting would stop the event loop that has to receive the answer.
        """
        if self._client.is_own_thread():
            raise RuntimeError("this would block the event loop that receives the answer: use `await ref.astatus()`")
        return status_of(self._ask().result())

    async def astatus(self) -> CallStatus:
        """Like `status`, for asynchronous code."""
        return status_of(await wrap_future(self._ask()))

    async def aprogress(self) -> Any:
        """Ask Redis what the call has reported last, also before this ref was made.

        Raises:
            CallNotFound, BrokerUnavailable: As for `status`.
        """
        packed = (await wrap_future(self._ask())).progress
        if packed is not None:
            self._take_progress(self._client.durable.by_id.open(packed, self._id).payload)
        return self._progress

    def __iter__(self) -> Iterator[Any]:
        """Iterate over what the call yields, from the first part of its current or last attempt.

        Raises:
            StreamBroken: The attempt has failed and another one begins. Iterate again to get its parts.
            QServeError: What `result` raises.
        """
        reader = _PartReader(self._id, self._client)
        while (page := self._wait_for(self._read(reader)).result()) is not None:
            yield from page
        self.result()

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Like `__iter__`, for asynchronous code."""
        reader = _PartReader(self._id, self._client)
        while (page := await wrap_future(self._wait_for(self._read(reader)))) is not None:
            for value in page:
                yield value
        await self

    async def _read(self, reader: "_PartReader") -> list[Any] | None:
        woken = asyncio.Event()
        self._news.add(woken)
        try:
            while True:
                woken.clear()
                parts, is_over = await reader.read()
                if parts:
                    return [self._codec.unpack(part.data) if part.packed else part.data for part in parts]
                if is_over:
                    return None
                with suppress(TimeoutError):
                    await asyncio.wait_for(woken.wait(), _LOOK_AGAIN_S)
        finally:
            self._news.discard(woken)

    def _wake(self) -> None:
        for woken in self._news:
            woken.set()

    def _wait_for(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        if self._client.is_own_thread():
            work.close()
            raise RuntimeError("this would block the event loop that receives the answer: `await` the ref")
        answered: Future[Any] = Future()

        async def run() -> None:
            try:
                answered.set_result(await work)
            except BaseException as exc:
                answered.set_exception(exc)

        self._client.run_soon(lambda: _start(run()))
        return answered

    def _ask(self) -> Future[CallRecord]:
        answered: Future[CallRecord] = Future()

        async def ask() -> None:
            try:
                record = await self._client.durable.by_id.describe(self._id)
                if record is None:
                    raise CallNotFound(f"there is no durable call {self._id!r}, or its record has expired")
                answered.set_result(record)
            except BaseException as exc:
                answered.set_exception(exc)

        self._client.run_soon(lambda: _start(ask()))
        return answered

    def withdraw(self) -> None:
        self._client.run_soon(self._withdraw)

    def is_forbidden_to_block(self) -> bool:
        return self._client.is_own_thread()

    def watch(self) -> None:
        """Start to wait for the end of a call that is about to be submitted. Runs on the loop of the client."""
        self._client.durable.watchers.watch(self._id, self._watcher)

    def attach(self) -> None:
        """Start to wait for the end of a call that has been submitted. Runs on the loop of the client."""
        self._client.durable.watchers.attach(self._id, self._watcher)

    def refuse(self, error: QServeError) -> None:
        """End with an error because the call was not taken. Runs on the loop of the client."""
        self._client.durable.watchers.forget(self._id, self._watcher)
        self._fail(error)

    def _withdraw(self) -> None:
        self._client.durable.watchers.forget(self._id, self._watcher)
        self._client.durable.by_id.cancel(self._id)

    def _fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):  # cancelled in this very moment
            self.set_exception(error)

    def _take_progress(self, packed: bytes) -> None:
        with suppress(QServeError):  # of a class that this process does not know
            self._progress = self._codec.unpack(packed)

    def _settle(self, outcome: Outcome) -> None:
        self._wake()
        if self.done():
            return
        try:
            if isinstance(outcome, QServeError):
                self.set_exception(outcome)
            elif outcome.kind == ERROR:
                self.set_exception(self._codec.rebuild_error(decode_error(flat(outcome.payload))))
            else:
                self.set_result(self._value(outcome))
        except Exception as exc:
            self._fail(exc)

    def _value(self, reply: Reply | LargeReply) -> Any:
        if reply.kind == HTTP_RESPONSE:
            return make_response(unpack_http(decode_http_response, reply.payload))
        return self._codec.unpack(reply.payload)


class _PartReader:
    """Reads the parts of one attempt of a call, a page at a time. Belongs to the client's loop."""

    def __init__(self, call_id: str, client: Client) -> None:
        self._id = call_id
        self._client = client
        self._attempt = self._after = self._count = 0

    async def read(self) -> tuple[list[Part], bool]:
        """Return the parts that follow those read before, and whether the call has ended."""
        record = await self._client.durable.by_id.describe(self._id)
        if record is None:
            raise CallNotFound(f"there is no durable call {self._id!r}, or its record has expired")
        if self._count and record.attempts != self._attempt:
            raise StreamBroken(
                f"attempt {self._attempt} of call {self._id} ended after {self._count} parts were read; attempt "
                f"{record.attempts} yields them again: iterate again"
            )
        self._attempt = record.attempts
        found = await self._client.durable.by_id.parts(record, self._after)
        for number, _, part in found:
            self._count += 1
            if part.index != self._count:
                raise StreamBroken(f"part {self._count} of attempt {self._attempt} of call {self._id} is missing")
            self._after = number
        return [part for _, _, part in found], record.state in ENDS


def make_response(response: HttpResponse) -> "Response":
    """The result of a call that came over HTTP, as a Python process gets it."""
    from starlette.responses import Response  # noqa: PLC0415  few processes meet one

    made = Response(response.body, response.status)
    made.raw_headers = [(name.lower(), value) for name, value in response.headers]
    return made


def _start(work: Coroutine[Any, Any, None]) -> None:
    spawn(work)


def status_of(record: CallRecord) -> CallStatus:
    """The status of a call, from its record."""
    return CallStatus(
        *(record.id, record.state, record.deployment, record.method, record.attempts, record.position),
        *(record.submitted, record.started, record.ended, record.due, record.error),
    )


def submit(
    client: Client,
    codec: Codec,
    deployment: str,
    method: str,
    payload: bytes,
    options: DurableOptions,
    meta: Mapping[str, str],
) -> tuple[DurableRef[Any], Ref[None]]:
    """Put a durable call; the second ref ends once Redis has it, with an error if it was refused."""
    admitted: Ref[None] = Ref()

    def on_admitted(verdict: str | QServeError) -> None:
        if isinstance(verdict, QServeError):
            ref.refuse(verdict)
            admitted.set_exception(verdict)
        else:
            admitted.set_result(None)

    submission = client.durable.submissions.prepare(
        deployment, kind=PYTHON, method=method, payload=payload, options=options, on_admitted=on_admitted, meta=meta
    )
    label = f"{deployment}.{method}" if method else deployment
    ref: DurableRef[Any] = DurableRef(client, codec, submission.call.id, label)

    def put() -> None:
        ref.watch()
        client.durable.submissions.submit(submission)

    client.run_soon(put)
    return ref, admitted


def attached_ref(client: Client, codec: Codec, call_id: str) -> DurableRef[Any]:
    """The ref of a call that any process has submitted.

    Raises:
        ValueError: This is no id of a durable call.
    """
    if not isinstance(call_id, str) or not is_call_id(call_id):
        raise ValueError(f"{call_id!r} is not the id of a durable call: that is in `ref.id`, or in a Location header")
    ref: DurableRef[Any] = DurableRef(client, codec, call_id, f"call {call_id}")
    client.run_soon(ref.attach)
    return ref
