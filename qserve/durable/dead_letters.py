"""Dead letters: calls that were given up on, to be listed, shown, sent again or dropped."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from qserve.broker.dead_letter_streams import (
    attempts_of,
    deployment_names,
    drop_letter,
    letter_of,
    letters,
    newest_letters,
    revive,
)
from qserve.broker.instance.state import State
from qserve.broker.keys import Keys
from qserve.broker.payloads import Payloads
from qserve.broker.records import submit_now
from qserve.errors import (
    BrokerUnavailable,
    CallNotFound,
    ConfigurationError,
    DeploymentNotFound,
    FrameRejected,
    QServeError,
)
from qserve.failpoints import reach
from qserve.wire.call_record import (
    NEVER_MS,
    DurableCall,
    DurableOptions,
    Terms,
    decode_durable_call,
    durable_with_meta,
    new_call_id,
)
from qserve.wire.codec import Codec
from qserve.wire.exceptions import plain_text
from qserve.wire.messages import DURABLE, HTTP, Call, Signer, decode_call, decode_http_request

_LONGEST_SHOWN = 2000

# Whoever looks at a letter runs no user code.
_codec = Codec(allow_pickle=False, max_bytes=1 << 40)


class Letter(NamedTuple):
    """One call that was given up on.

    Attributes:
        id: The id of the letter, which is not that of the call.
        call: The call; None if no key of the instance signed it.
        durable: Whether the call has a record, which gets the new outcome when the call is sent again.
        attempts: How often the call was started; None if that is not known.
        reason: Why it was given up: the last error.
        at: Unix time in ms on Redis' clock.
    """

    id: str
    deployment: str
    call: Call | None
    durable: bool
    attempts: int | None
    reason: str
    at: int

    def facts(self) -> dict[str, Any]:
        """What is known of the letter, in JSON types."""
        call = self.call
        return {
            "letter": self.id,
            "call": call.id if call is not None else None,
            "deployment": self.deployment,
            "method": (call.method or "__call__") if call is not None else None,
            "durable": self.durable,
            "attempts": self.attempts,
            "reason": self.reason,
        }


class DeadLetters:
    """The dead letters of an instance. Synchronous.

    Every method raises `BrokerUnavailable` or `ConfigurationError` where Redis cannot be asked.

    Args:
        out_of_line_bytes: The setting of that name, for calls that are sent again.
    """

    def __init__(self, state: State, out_of_line_bytes: int) -> None:
        self._redis = state.redis
        self._keys: Keys = state.keys
        self._signer: Signer = state.signer
        self._payloads = Payloads(state.keys, state.signer, out_of_line_bytes)

    def of(self, deployment: str) -> Iterator[Letter]:
        """The letters of a deployment, oldest first."""
        return iter(self._read(deployment, letters(self._redis, self._keys, deployment)))

    def get(self, deployment: str, letter_id: str) -> Letter:
        """Find a letter by its own id or by that of its call.

        Raises:
            CallNotFound: There is no such letter.
        """
        # Most are found at once; to look for one among thousands takes as long as to list them.
        noted = letter_of(self._redis, self._keys, deployment, letter_id)
        for letter in self._read(deployment, noted) or self.of(deployment):
            if letter_id in (letter.id, letter.call.id if letter.call is not None else ""):
                return letter
        raise CallNotFound(f"there is no dead letter {letter_id!r} of {deployment!r}")

    def newest(self, deployment: str, most: int, before: str = "+") -> list[Letter]:
        """The newest letters of a deployment, the newest first: those with ids below `before`."""
        return self._read(deployment, newest_letters(self._redis, self._keys, deployment, most, before))

    def all(self) -> Iterator[Letter]:
        """The letters of all deployments."""
        for name in deployment_names(self._redis, self._keys):
            yield from self.of(name)

    def contents(self, letter: Letter) -> dict[str, Any]:
        """The arguments or the request of a call, in JSON types; empty if no key of the instance signed it."""
        if letter.call is None:
            return {}
        try:
            return shown_contents(letter.call.kind, self.payload(letter))
        except (BrokerUnavailable, ConfigurationError):
            raise
        except QServeError as exc:  # a payload that has expired
            return {"contents": str(exc)}

    def payload(self, letter: Letter) -> bytes:
        """What the call carries: packed arguments, or an encoded HttpRequest.

        Raises:
            FrameRejected, CallNotFound: The payload cannot be read, or is gone.
        """
        if letter.call is None:
            raise FrameRejected("no key of ours signed this frame")
        if not letter.call.out_of_line:
            return letter.call.payload
        payload = self._payloads.fetch_now(self._redis, letter.call.id)
        if payload is None:
            why = (
                "its large arguments have expired"
                if letter.durable
                else "its large arguments were in the memory of its caller: only those of durable calls are kept"
            )
            raise CallNotFound(f"the call cannot be sent again, because {why}")
        return payload

    def retry(self, letter: Letter) -> str:
        """Send the call of a letter again, and return the id of the durable call that has the new result.

        A durable call keeps its id; an ordinary call, whose caller has had an error, becomes a durable one.

        Raises:
            FrameRejected: No key of the instance signed the call.
            CallNotFound: The letter, or the record, is gone.
            DeploymentNotFound, DeploymentUnavailable, BackPressureError: The call was not taken.
        """
        if letter.call is None:
            raise FrameRejected("no key of ours signed this frame: it is not sent again")
        if not letter.durable:
            return self._send_anew(letter, letter.call)
        name, call_id = letter.deployment, letter.call.id
        reach("revive")
        said = revive(self._redis, self._keys, name, letter.id, call_id)
        reach("revived")
        if said == "deleted":
            raise DeploymentNotFound(f"there is no deployment {name!r}: `qserve status` lists those that exist")
        if said == "forgotten":
            raise CallNotFound(
                f"call {call_id} cannot be sent again: its record has expired, or is not that of a dead letter. "
                f"`qserve dead show {name} {letter.id}` shows its arguments: submit it once more, and drop the letter"
            )
        if said != "queued":
            raise CallNotFound(
                f"call {call_id} is not a dead letter any more: somebody has sent it again or dropped it"
            )
        return call_id

    def drop(self, letter: Letter) -> None:
        """Remove a letter. The record of a durable call stays until it expires."""
        drop_letter(self._redis, self._keys, letter.deployment, letter.id)

    def _send_anew(self, letter: Letter, call: Call) -> str:
        """An ordinary call has been answered with its error; what is sent again is a durable one."""
        name = letter.deployment
        call_id = new_call_id(self._keys.of(name).shard)
        head = (call_id, name, "", NEVER_MS, call.kind, call.method, True, self.payload(letter))
        made = DurableCall(*head, terms=Terms())
        if call.meta:
            made = durable_with_meta(made, call.meta)
        submit_now(self._redis, self._keys, self._signer, self._payloads, made, DurableOptions())
        self.drop(letter)
        return call_id

    def _read(self, deployment: str, found: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> list[Letter]:
        calls = [self._open(fields) for _, fields in found]
        durable = [DURABLE.encode() in fields.get(b"f", b"") for _, fields in found]
        ids = [call.id for call, is_durable in zip(calls, durable, strict=True) if call is not None and is_durable]
        attempts = attempts_of(self._redis, self._keys, ids)
        return [
            Letter(
                letter_id.decode(),
                deployment,
                call,
                is_durable,
                attempts.get(call.id) if call is not None and is_durable else None,
                fields.get(b"err", b"").decode("utf-8", "replace"),
                int(letter_id.partition(b"-")[0]),
            )
            for (letter_id, fields), call, is_durable in zip(found, calls, durable, strict=True)
        ]

    def _open(self, fields: dict[bytes, bytes]) -> Call | None:
        decode = decode_durable_call if DURABLE.encode() in fields.get(b"f", b"") else decode_call
        try:
            return decode(self._signer.open(fields.get(b"d", b"")))
        except (FrameRejected, msgspec.DecodeError):
            return None


def shown_contents(kind: int, payload: bytes) -> dict[str, Any]:
    """The arguments or the request of a call of that kind, in JSON types; runs no code of users."""
    try:
        if kind != HTTP:
            args, kwargs = _codec.unpack_call(payload)
            return {"args": _shown(args), "kwargs": _shown(kwargs)}
        request = decode_http_request(payload)
    except QServeError as exc:  # a pickle
        return {"contents": str(exc)}
    query = b"?" + request.query_string if request.query_string else b""
    shown: dict[str, Any] = {"request": f"{request.method} {request.path}{query.decode('latin-1')}"}
    with contextlib.suppress(UnicodeDecodeError):
        shown["body"] = request.body[:_LONGEST_SHOWN].decode()
    return shown


def _shown(value: Any) -> Any:
    try:
        plain = msgspec.to_builtins(value, enc_hook=repr, str_keys=True)
        text = msgspec.json.encode(plain).decode()
    except (TypeError, UnicodeEncodeError):  # tuples as keys, or half a surrogate pair
        plain = text = plain_text(repr(value))
    return plain if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."
