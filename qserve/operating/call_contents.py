"""What a durable call was given and what it has returned, as operators are shown it."""

import contextlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote_plus

import msgspec

from qserve.broker.history.call_index import CallSummary, frame_of, newest_parts, progress_frame, result_frame
from qserve.broker.instance.state import State
from qserve.broker.payloads import Payloads, result_id
from qserve.durable.dead_letters import DeadLetters, shown_contents
from qserve.errors import CallNotFound, FrameRejected
from qserve.wire.call_record import decode_durable_call, decode_part
from qserve.wire.codec import Codec
from qserve.wire.messages import ERROR, HTTP_RESPONSE, decode_error, decode_http_response, decode_reply

PARTS_SHOWN = 20
_LONGEST_SHOWN = 4_000

_codec = Codec(allow_pickle=False, max_bytes=1 << 40)  # whoever looks at a call runs no user code


class CallContents(NamedTuple):
    """What a call was given and what it returned, as far as it is kept and can be shown.

    Attributes:
        arguments: JSON types; None if they are not kept any more.
        result: JSON types; None if there is none.
        error: The traceback, or the text of the error.
        progress: What its code reported last, in JSON types.
        parts: The last of the parts that it has given, in JSON types.
    """

    arguments: dict[str, Any] | None
    result: Any
    error: str
    progress: Any = None
    parts: Sequence[Any] = ()


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
    result, error = _outcome(state, call, hidden)
    progress = _progress(state, call.id, hidden)
    frames = newest_parts(state.redis, state.keys, call, PARTS_SHOWN) if call.parts else []
    parts = [_without(_part(state, each, hidden), hidden) for each in frames]
    return CallContents(
        *(_without(arguments, hidden), _without(result, hidden), error or call.error),
        *(_without(progress, hidden), parts),
    )


def _part(state: State, frame: bytes, hidden: Sequence[str]) -> Any:
    try:
        part = decode_part(decode_reply(state.signer.open(frame)).payload)
        return _plain(part.data, hidden) if part.packed else part.data[:_LONGEST_SHOWN].decode("utf-8", "replace")
    except Exception as exc:  # a pickle, or a class that is not here
        return f"cannot be shown: {exc}"


def _progress(state: State, call_id: str, hidden: Sequence[str]) -> Any:
    frame = progress_frame(state.redis, state.keys, call_id)
    if frame is None:
        return None
    try:
        return _plain(decode_reply(state.signer.open(frame)).payload, hidden)
    except Exception as exc:  # a pickle, or a class that is not here
        return f"cannot be shown: {exc}"


def _outcome(state: State, call: CallSummary, hidden: Sequence[str]) -> tuple[Any, str]:
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
        return _plain(payload, hidden), ""
    except Exception as exc:  # a pickle, or a class that is not here
        return f"cannot be shown: {exc}", ""


def _plain(packed: bytes, hidden: Sequence[str]) -> Any:
    plain = _without(msgspec.to_builtins(_codec.unpack(packed), enc_hook=repr, str_keys=True), hidden)
    text = msgspec.json.encode(plain).decode()
    return plain if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


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
    if isinstance(value, str):  # JSON that was cut or sent as text, or a form, or what follows a path
        for written in (_in_json, _in_query, _in_form):
            value = written(lambda found: _hide(found, hidden), value)
    return value


def _hide(found: re.Match[str], hidden: Sequence[str]) -> str:
    name = unquote_plus(found["name"]).lower()
    if not any(word in name for word in hidden):
        return found[0]
    value = '"(hidden)"' if found.re is _JSON else "(hidden)"
    return f"{found[0][: found.start('value') - found.start()]}{value}"


# Text may have been cut within a value, and there may be quotes within one.
_JSON = re.compile(r'"(?P<name>[^"]*)"\s*:\s*(?P<value>"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[^\s"{}\[\],]+)')
_in_json = _JSON.sub
_in_query = re.compile(r'(?:\A|[?&\s])(?P<name>[^\s=&?"]+)=(?P<value>[^\s&"]+)').sub
_in_form = re.compile(
    r'\bname="(?P<name>[^"]*)"[^\n]*\n(?:[^\r\n]+\r?\n)*\r?\n(?P<value>.*?)(?=\r?\n--|\Z)', re.DOTALL
).sub
