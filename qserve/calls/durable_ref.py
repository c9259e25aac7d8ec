"""References to durable calls: results that any process can ask for, now or later."""

import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from typing_extensions import TypeVar

from qserve.calls.client import Client
from qserve.calls.handoff import run_when_dropped
from qserve.calls.inquiries import Inquiries
from qserve.calls.ref import Ref
from qserve.errors import QServeError
from qserve.wire.call_record import CallRecord, DurableOptions, is_call_id
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

T = TypeVar("T", default=Any)


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
        self._asking = Inquiries(client, codec, call_id)
        self._watcher = _RefWatcher(self)
        self._is_watched = False

    def __del__(self) -> None:
        if self._is_watched and not self.done():
            watchers, call_id, watcher = self._client.durable.watchers, self._id, self._watcher
            run_when_dropped(self._client, lambda: watchers.forget(call_id, watcher))

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
        return status_of(self._asking.wait_for(self._asking.describe(), "`await ref.astatus()`"))

    async def astatus(self) -> CallStatus:
        """Like `status`, for asynchronous code."""
        return status_of(await self._asking.wait_async(self._asking.describe()))

    async def aprogress(self) -> Any:
        """Ask Redis what the call has reported last, also before this ref was made.

        Raises:
            CallNotFound, BrokerUnavailable: As for `status`.
        """
        packed = (await self._asking.wait_async(self._asking.describe())).progress
        if packed is not None:
            self.take_progress(self._client.durable.by_id.open(packed, self._id).payload)
        return self._progress

    def __iter__(self) -> Iterator[Any]:
        """Iterate over what the call yields, from the first part of its current or last attempt.

        Raises:
            StreamBroken: The attempt has failed and another one begins. Iterate again to get its parts.
            QServeError: What `result` raises.
        """
        reader = self._asking.part_reader()
        while (page := self._asking.wait_for(self._asking.read(reader), "`async for`")) is not None:
            yield from page
        self.result()

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Like `__iter__`, for asynchronous code."""
        reader = self._asking.part_reader()
        while (page := await self._asking.wait_async(self._asking.read(reader))) is not None:
            for value in page:
                yield value
        await self

    def take_news(self) -> None:
        """Let those who read what the call yields look again. Runs on the loop of the client."""
        self._asking.wake()

    def tell_when_done(self, fn: Callable[[Any], object]) -> None:
        """Call `fn` with this ref once it is done, even if nobody else holds the ref until then."""
        super().tell_when_done(fn)
        if not self.done():
            self._watcher.holds = self
            if self.done():  # in this very moment
                self._watcher.holds = None

    def remove_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Do not call `fn` once it is done; without effect where that has begun."""
        super().remove_done_callback(fn)
        if not self._done_callbacks:
            self._watcher.holds = None

    def withdraw(self) -> None:
        self._client.run_soon(self._withdraw)

    def is_forbidden_to_block(self) -> bool:
        return self._client.is_own_thread()

    def watch(self) -> None:
        """Start to wait for the end of a call that is about to be submitted. Runs on the loop of the client."""
        self._is_watched = True
        self._client.durable.watchers.watch(self._id, self._watcher)

    def attach(self) -> None:
        """Start to wait for the end of a call that has been submitted. Runs on the loop of the client."""
        self._is_watched = True
        self._client.durable.watchers.attach(self._id, self._watcher)

    def refuse(self, error: QServeError) -> None:
        """End with an error because the call was not taken. Runs on the loop of the client."""
        self._forget()
        self._fail(error)

    def _withdraw(self) -> None:
        self._forget()
        self._client.durable.by_id.cancel(self._id)

    def _forget(self) -> None:
        self._client.durable.watchers.forget(self._id, self._watcher)
        self._watcher.holds = None

    def _fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):  # cancelled in this very moment
            self.set_exception(error)

    def take_progress(self, packed: bytes) -> None:
        """Note what the call has reported."""
        with suppress(QServeError):  # of a class that this process does not know
            self._progress = self._codec.unpack(packed)

    def take_outcome(self, outcome: Outcome) -> None:
        """End as the call has ended. Runs on the loop of the client."""
        self.take_news()
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


class _RefWatcher:
    """Tells a ref of its call, and does not keep it: a ref that was dropped need not be told."""

    __slots__ = ("_ref", "holds")

    def __init__(self, ref: DurableRef[Any]) -> None:
        self._ref = weakref.ref(ref)
        self.holds: object = None
        """The ref, while others are to be told through it, who may not hold it."""

    def on_outcome(self, outcome: Outcome) -> None:
        ref, self.holds = self._ref(), None
        if ref is not None:
            ref.take_outcome(outcome)

    def on_progress(self, packed: bytes) -> None:
        ref = self._ref()
        if ref is not None:
            ref.take_progress(packed)

    def on_news(self) -> None:
        ref = self._ref()
        if ref is not None:
            ref.take_news()


def make_response(response: HttpResponse) -> "Response":
    """The result of a call that came over HTTP, as a Python process gets it."""
    from starlette.responses import Response  # noqa: PLC0415  few processes meet one

    made = Response(response.body, response.status)
    made.raw_headers = [(name.lower(), value) for name, value in response.headers]
    return made


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
