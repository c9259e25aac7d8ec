"""A call on its way out: the ref that sends it, and the wait for refs among its arguments."""

import contextlib
import threading
from collections.abc import Mapping
from concurrent.futures import InvalidStateError
from functools import partial
from typing import Any, Protocol

from qserve.broker.large.lending import ON_THE_LOOP
from qserve.calls.client import Client
from qserve.calls.pending import PendingCall
from qserve.calls.ref import Ref
from qserve.context import CallInfo, current_call
from qserve.errors import QServeError
from qserve.values.borrowing import Borrowed
from qserve.wire.codec import Codec, collect_refs, substitute
from qserve.wire.messages import ERROR, NO_META, PYTHON, REQUEST, VALUE, WITHIN, LargeReply, Outcome, decode_error
from qserve.wire.parts import Passed, Payload, flat


def meta_within(caller: CallInfo, meta: Mapping[str, str]) -> Mapping[str, str]:
    """What goes beside a call that another one makes: which calls it is a part of, and the id of the request."""
    if not caller.lineage:
        return meta
    within = {**meta, WITHIN: caller.lineage}
    if not caller.lineage.startswith(caller.request_id):
        within[REQUEST] = caller.request_id
    return within


class CallToSend(Protocol):
    """A call whose arguments are not all there yet; the methods may be called from any thread."""

    @property
    def label(self) -> str:
        """The name of what is called, for messages."""

    def send(self, payload: Payload) -> None:
        """Put it with its packed arguments."""

    def fail(self, error: BaseException) -> None:
        """End it with an error that arose in this process."""

    def done(self) -> bool:
        """Whether it has ended."""

    def cancelled(self) -> bool:
        """Whether it was cancelled."""

    def withdraw(self) -> None:
        """Withdraw what was put."""


class CallRef(Ref[Any]):
    """The ref of a call that is on its way: sends it, withdraws it, and takes in its outcome."""

    _meta: Mapping[str, str] = NO_META
    _is_passed_on = False

    def __init__(self, client: Client, codec: Codec, deployment: str, method: str, timeout_s: float | None) -> None:
        super().__init__()
        self._client = client
        self._codec = codec
        self._deployment = deployment
        self._method = method
        self._timeout_s = timeout_s
        self._pending: PendingCall | None = None
        self._caller: CallInfo | None = None

    def start(self, args: tuple[Any, ...], kwargs: dict[str, Any], meta: Mapping[str, str] = NO_META) -> None:
        """Put the call, at once or when the refs among its arguments are there.

        It inherits the remaining time and the cancellation of the call that makes it, if one does.

        Raises:
            ValueNotSerializable, PayloadTooLarge: An argument cannot be sent.
        """
        if meta:
            self._meta = meta
        self._caller = current_call.get()
        payload = self._codec.pack_plain_call(args, kwargs)
        if payload is not None:
            self.send(payload)
        elif refs := collect_refs(args, kwargs):
            if self._caller is not None:
                self._caller.nested.add(self)
            WaitForArguments(self, self._codec, args, kwargs, refs).start()
        else:
            self.send(self._codec.pack_arguments(args, kwargs, f"the call to {self.label}"))

    @property
    def label(self) -> str:
        """The name of what is called, for messages."""
        return f"{self._deployment}.{self._method}" if self._method else self._deployment

    @property
    def request_id(self) -> str:
        return self._pending.id if self._pending is not None else ""

    def inherit_cancellation(self) -> None:
        """Withdraw it even if it runs and is not safe, because the call that made it is withdrawn."""
        if self._pending is not None:
            self._client.withdraw(self._pending, inherited=True)
        else:
            self.cancel()

    @property
    def awaited(self) -> str:
        return self._pending.id if self.is_waited_for and self._pending is not None and not self.done() else ""

    def send(self, payload: Payload) -> None:
        """Put the call with its packed arguments, which are copied if they are large."""
        timeout_s = self._client.settings.handle_timeout_s if self._timeout_s is None else self._timeout_s
        meta, caller = self._meta, self._caller
        if caller is not None:
            timeout_s = caller.limit(timeout_s)
            meta = meta_within(caller, meta)
        self._pending = self._client.prepare(
            self._deployment,
            kind=PYTHON,
            method=self._method,
            payload=payload,
            timeout_s=timeout_s,
            safe=False,
            on_outcome=self._settle,
            meta=meta,
        )
        if caller is not None:
            caller.nested.add(self)
        self._client.submit(self._pending)

    def pass_on(self) -> None:
        super().pass_on()
        self._is_passed_on = True

    def as_argument(self) -> object:
        raw = self.raw_result
        return Passed(raw) if isinstance(raw, Borrowed) else self.result(0)

    def fail(self, error: BaseException) -> None:
        """End with an error that arose in this process, unless it was cancelled."""
        self._leave_caller()
        with contextlib.suppress(InvalidStateError):
            self.set_exception(error)

    def withdraw(self) -> None:
        if self._pending is not None:
            self._client.withdraw(self._pending)
        else:
            self._leave_caller()

    def _leave_caller(self) -> None:
        if self._caller is not None:
            self._caller.nested.discard(self)

    def is_forbidden_to_block(self) -> bool:
        return self._client.is_own_thread()

    def _settle(self, outcome: Outcome) -> None:
        if self._caller is not None:
            self._caller.nested.discard(self)
        if type(outcome) is LargeReply:
            self._settle_large(outcome)
        else:
            self._take(outcome)

    def _settle_large(self, outcome: LargeReply) -> None:
        source = outcome.payload
        if self._is_passed_on and outcome.kind == VALUE and isinstance(source, Borrowed):
            source.hold()
            with contextlib.suppress(InvalidStateError):  # cancelled
                self.set_raw_result(source, self._codec.unpack)
        elif len(source) > ON_THE_LOOP:
            self._client.lending.run(partial(self._take, outcome))
        else:
            self._take(outcome)

    def _take(self, outcome: Outcome) -> None:
        if self.done():
            return  # cancelled
        try:
            if isinstance(outcome, QServeError):
                self.set_exception(outcome)
            elif outcome.kind == ERROR:
                self.set_exception(self._codec.rebuild_error(decode_error(flat(outcome.payload))))
            else:
                self.set_result(self._codec.unpack(outcome.payload))
        except Exception as exc:
            self.fail(exc)


class WaitForArguments:
    """Sends a call once the results of the refs among its arguments are there, and blocks nobody meanwhile."""

    def __init__(
        self, call: CallToSend, codec: Codec, args: tuple[Any, ...], kwargs: dict[str, Any], refs: list[Ref[Any]]
    ) -> None:
        self._call = call
        self._codec = codec
        self._args = args
        self._kwargs = kwargs
        self._refs = refs
        self._missing = len(refs)
        self._lock = threading.Lock()

    def start(self) -> None:
        for ref in self._refs:
            ref.pass_on()
        for ref in self._refs:
            ref.add_done_callback(self._one_done)

    def _one_done(self, _ref: object) -> None:
        with self._lock:
            self._missing -= 1
            if self._missing:
                return
        refs, self._refs = self._refs, []  # they refer to this object, and the collector comes seldom
        args, self._args = self._args, ()
        kwargs, self._kwargs = self._kwargs, {}
        if self._call.done():
            return  # cancelled meanwhile
        try:
            values = {ref: ref.as_argument() for ref in refs}
            args, kwargs = substitute(args, kwargs, values)
            self._call.send(self._codec.pack_arguments(args, kwargs, f"the call to {self._call.label}"))
        except Exception as exc:
            self._call.fail(exc)
        if self._call.cancelled():  # in this very moment
            self._call.withdraw()
