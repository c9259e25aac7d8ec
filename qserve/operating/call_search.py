"""Finding durable calls by what is known of them, and everything about one of them."""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from qserve.broker.history.call_index import (
    STATES,
    CallSummary,
    frame_of,
    newest_ids,
    progress_frame,
    result_frame,
    summaries,
)
from qserve.broker.instance.state import State
from qserve.broker.payloads import Payloads, result_id
from qserve.durable.dead_letters import DeadLetters, shown_contents
from qserve.errors import CallNotFound, FrameRejected
from qserve.wire.call_record import decode_durable_call, is_call_id
from qserve.wire.codec import Codec
from qserve.wire.messages import ERROR, HTTP_RESPONSE, decode_error, decode_http_response, decode_reply

PAGE = 50
_SCANNED_AT_ONCE, _MOST_SCANNED = 200, 2_000
_LONGEST_SHOWN = 4_000

_codec = Codec(allow_pickle=False, max_bytes=1 << 40)  # whoever looks at a call runs no user code


@dataclass(frozen=True)
class CallFilter:
    """Which calls to list; what is empty does not matter.

    Attributes:
        states: Some of STATES.
        deployment: Name of the deployment.
        method: Name of the method.
        error: A part of the text of the last error, in any case of letters.
        since, before: Unix times between which a call entered its state.
    """

    states: tuple[str, ...] = ()
    deployment: str = ""
    method: str = ""
    error: str = ""
    since: float = 0.0
    before: float = float("inf")

    def check(self) -> None:
        """Raise ValueError if there is no such state."""
        unknown = sorted(set(self.states) - set(STATES))
        if unknown:
            raise ValueError(f"there is no state {unknown[0]!r}: calls are {', '.join(STATES)}")

    def fits(self, call: CallSummary) -> bool:
        """Whether a call is one of them, apart from its time."""
        return (
            (not self.states or call.state in self.states)
            and (not self.deployment or call.deployment == self.deployment)
            and (not self.method or (call.method or "__call__") == self.method)
            and (not self.error or self.error.lower() in call.error.lower())
        )


class Found(NamedTuple):
    """Calls, the newest first.

    Attributes:
        next_before: `before` of the next ones; None if there are none.
        is_cut: The search ended at its limit, so that there may be more although few were found.
    """

    calls: list[tuple[float, CallSummary]]
    next_before: float | None
    is_cut: bool = False


def find_calls(state: State, wanted: CallFilter, most: int = PAGE) -> Found:
    """Find durable calls. It looks at 2,000 calls at most, however many there are.

    Raises:
        ValueError: There is no such state.
        BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be asked.
    """
    wanted.check()
    names = [wanted.deployment] if wanted.deployment else state.names()
    places = [(name, each) for name in names for each in (wanted.states or STATES)]
    calls: list[tuple[float, CallSummary]] = []
    before, scanned = wanted.before, 0
    while scanned < _MOST_SCANNED:
        ids = newest_ids(state.redis, state.keys, places, before, wanted.since, _SCANNED_AT_ONCE)
        scanned += len(ids)
        records = summaries(state.redis, state.keys, [call_id for _, call_id in ids])
        for at, call_id in ids:
            record = records.get(call_id)
            if record is not None and wanted.fits(record):
                if len(calls) == most:
                    return Found(calls, calls[-1][0])
                calls.append((at, record))
        if len(ids) < _SCANNED_AT_ONCE:
            return Found(calls, None)
        before = ids[-1][0]
    return Found(calls, before, is_cut=True)


class CallContents(NamedTuple):
    """What a call was given and what it returned, as far as it is kept and can be shown.

    Attributes:
        arguments: JSON types; None if they are not kept any more.
        result: JSON types; None if there is none.
        error: The traceback, or the text of the error.
        progress: What its code reported last, in JSON types.
    """

    arguments: dict[str, Any] | None
    result: Any
    error: str
    progress: Any = None


def find_call(state: State, call_id: str) -> CallSummary:
    """The record of a call in short.

    Raises:
        CallNotFound: There is none, or none any more.
        BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be asked.
    """
    found = summaries(state.redis, state.keys, [call_id]) if is_call_id(call_id) else {}
    if call_id not in found:
        raise CallNotFound(f"there is no durable call {call_id[:100]!r}, or its record has expired")
    return found[call_id]


def contents_of(state: State, call: CallSummary, hidden: Sequence[str] = ()) -> CallContents:
    """What a call was given and what it returned.

    Args:
        hidden: Names of arguments and of fields within values that are not shown.
    """
    arguments: dict[str, Any] | None = None
    frame = frame_of(state.redis, state.keys, call.id)
    if frame is not None:
        try:
            given = decode_durable_call(state.signer.open(frame))
            payload = _fetched(state, given.id) if given.out_of_line else given.payload
            arguments = shown_contents(given.kind, payload) if payload is not None else None
        except (FrameRejected, msgspec.DecodeError) as exc:
            arguments = {"contents": str(exc)}
    elif call.state == "dead":
        letters = DeadLetters(state, 0)
        with contextlib.suppress(CallNotFound):  # dropped
            arguments = letters.contents(letters.get(call.deployment, call.id))
    result, error = _outcome(state, call)
    progress = _progress(state, call.id)
    return CallContents(
        *(_without(arguments, hidden), _without(result, hidden)), error or call.error, _without(progress, hidden)
    )


def _progress(state: State, call_id: str) -> Any:
    frame = progress_frame(state.redis, state.keys, call_id)
    if frame is None:
        return None
    try:
        payload = decode_reply(state.signer.open(frame)).payload
        return msgspec.to_builtins(_codec.unpack(payload), enc_hook=repr, str_keys=True)
    except Exception as exc:  # a pickle, or a class that is not here
        return f"cannot be shown: {exc}"


def _outcome(state: State, call: CallSummary) -> tuple[Any, str]:
    frame = result_frame(state.redis, state.keys, call.id)
    if frame is None:
        return None, ""
    try:
        reply = decode_reply(state.signer.open(frame))
        payload = _fetched(state, result_id(call.id)) if reply.out_of_line else reply.payload
        if payload is None:
            return "the result is not kept any more", ""
        if reply.kind == ERROR:
            error = decode_error(payload)
            return None, error.traceback_text or f"{error.type_name}: {error.message}"
        if reply.kind == HTTP_RESPONSE:
            response = decode_http_response(payload)
            return {"status": response.status, "body": response.body[:_LONGEST_SHOWN].decode("utf-8", "replace")}, ""
        plain = msgspec.to_builtins(_codec.unpack(payload), enc_hook=repr, str_keys=True)
    except Exception as exc:  # a pickle, or a class that is not here
        return f"cannot be shown: {exc}", ""
    text = msgspec.json.encode(plain).decode()
    return (plain if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."), ""


def _fetched(state: State, payload_id: str) -> bytes | None:
    return Payloads(state.keys, state.signer, 0).fetch_now(state.redis, payload_id)


def _without(value: Any, hidden: Sequence[str]) -> Any:
    if not hidden:
        return value
    if isinstance(value, dict):
        return {
            key: "(hidden)" if any(word in str(key).lower() for word in hidden) else _without(each, hidden)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without(each, hidden) for each in value]
    if isinstance(value, str):
        for word in hidden:
            value = re.sub(rf'(?i)("[^"]*{re.escape(word)}[^"]*"\s*:\s*)"[^"]*"', r'\1"(hidden)"', value)
    return value
