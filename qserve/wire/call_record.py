"""Durable calls as inert data: a call that is more than a message, because a record in Redis stands for it.

The record is a hash, which lua/shared_records.lua describes. It holds the state and, at the end, the result, for
whoever knows the id of the call. The id is random: knowing it is the permission to see the result.
"""

import secrets
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from qserve.background import CHANCE
from qserve.errors import QServeError, TaskError, failure_of
from qserve.wire.messages import Call, decoder_of
from qserve.wire.seconds import check_seconds

SCHEDULED, QUEUED, RUNNING = "scheduled", "queued", "running"
"""States of a call that goes on: waits for its time; waits for a replica; runs."""
DONE, FAILED, CANCELLED, DEAD, EXPIRED = "done", "failed", "cancelled", "dead", "expired"
"""How a call can end. A dead one may be sent again."""
ENDS = frozenset({DONE, FAILED, CANCELLED, DEAD, EXPIRED})
HAS_EXPIRED = (
    "the call expired before it ran, or before it was tried again: its record says how often it was tried, and how "
    "that failed (status() of its ref, or qserve calls show)"
)
"""Who lets a call expire does not always know whether it was tried before."""

ANYONE = ""
"""Receiver of a durable call's result: whoever asks for it by its id."""
PROGRESS = 5
"""Kind of a reply that is not the last one: the packed value that user code reported."""
PART, NEWS = 6, 7
"""Kinds of replies, too: an encoded Part, and word to those who wait that there is one."""

RESULT_TTL_S = 86_400.0
DEAD_TTL_S = 7 * RESULT_TTL_S
IDEMPOTENCY_TTL_S = 86_400.0
NEVER_MS = 1 << 62
"""Deadline of a call that waits as long as it takes; whether it expired says its record."""
_LONGEST_BACKOFF_S = 600.0

Priority = Literal["interactive", "batch"]
Durability = Literal["memory", "fsync", "replica"]
"""Where Redis has a call when it is said to be submitted: in its memory, on its disk, or on a replica of it, too."""


class Terms(msgspec.Struct, frozen=True, array_like=True):
    """The terms of a durable call, signed together with it.

    Attributes:
        retries: How often it may run again after user code raised.
        backoff_s: Seconds before the first of them, doubled for each one after.
        retry_on: Names of exception classes, with or without their module; empty: whatever user code raises.
        result_ttl_s: How long its record is kept after its end.
        celery_id: Id of the task, if a Celery client submitted it and wants the result.
    """

    retries: int = 0
    backoff_s: float = 1.0
    retry_on: tuple[str, ...] = ()
    result_ttl_s: float = RESULT_TTL_S
    celery_id: str = ""

    def retries_after(self, error: BaseException) -> bool:
        """Whether this is an error to try again after."""
        if not self.retry_on:  # not what is wrong with the call itself, and would be again
            return not isinstance(error, QServeError) or isinstance(error, TaskError)
        names = {name for cls in type(error).__mro__ for name in (cls.__name__, f"{cls.__module__}.{cls.__qualname__}")}
        if isinstance(error, TaskError) and (failure := failure_of(error)).type_name:
            names |= {failure.type_name, failure.type_name.rpartition(".")[2], f"{failure.module}.{failure.type_name}"}
        return not names.isdisjoint(self.retry_on)

    def state_after(self, error: BaseException, failures: int) -> str:
        """The state of a call that has failed that often, lastly with this error: SCHEDULED if it runs again."""
        if not self.retries_after(error):
            return FAILED
        if failures <= self.retries:
            return SCHEDULED
        return DEAD if self.retries else FAILED

    def pause_ms(self, failures: int) -> int:
        """How long to wait after that many failures: exponential, with jitter, 10 minutes at most."""
        longest = min(self.backoff_s * 2.0 ** min(failures - 1, 60), _LONGEST_BACKOFF_S)
        return int(longest * CHANCE.uniform(500, 1000))


class DurableCall(Call, frozen=True, array_like=True, gc=False, kw_only=True):
    """A call with its terms. It stands in a queue like any other call."""

    terms: Terms


class DurableCallWithMeta(DurableCall, frozen=True, array_like=True, gc=False, kw_only=True):
    """A durable call with what the hooks of its caller say. Every durable call is decoded as one."""

    meta: dict[str, str] = msgspec.field(default_factory=dict)


def durable_with_meta(call: DurableCall, meta: Mapping[str, str]) -> DurableCallWithMeta:
    """The call, with what the hooks of its caller say."""
    fields = {name: getattr(call, name) for name in DurableCall.__struct_fields__}
    return DurableCallWithMeta(**fields, meta=dict(meta))


decode_durable_call = decoder_of(DurableCallWithMeta)


class DurableOptions(NamedTuple):
    """How a durable call is submitted; see `DeploymentHandle.options`."""

    delay_s: float = 0.0
    expires_s: float | None = None
    low_priority: bool = False
    terms: Terms = Terms()
    idempotency: str = ""
    """Hash of the caller's idempotency key, "" without one."""
    body_hash: str = ""
    durability: Durability | None = None
    """None: as the settings say."""
    key: str = ""
    """The idempotency key as the caller gave it, for those who look for the call by it."""
    parent: str = ""
    """Id of the call that makes it, "" where none does."""


def make_durable_options(
    *,
    delay: float = 0.0,
    retries: int = 0,
    backoff: float = 1.0,
    retry_on: Iterable[str | type[BaseException]] | str | type[BaseException] = (),
    expires: float | None = None,
    priority: Priority = "interactive",
    result_ttl: float = RESULT_TTL_S,
    durability: Durability | None = None,
) -> DurableOptions:
    """Check the options of a durable call as users give them.

    Raises:
        ValueError, TypeError: An option has an impossible value.
    """
    for name, value, least in (
        *(("delay", delay, 0.0), ("retries", retries, 0), ("backoff", backoff, 0.0)),
        *(("result_ttl", result_ttl, 1.0), ("expires", 0.001 if expires is None else expires, 0.001)),
    ):
        check_seconds(name, value, least)
    if retries != int(retries):
        raise ValueError(f"retries must be a whole number, not {retries!r}")
    if priority not in ("interactive", "batch"):
        raise ValueError(f"priority must be 'interactive' or 'batch', not {priority!r}")
    if durability not in (None, *get_args(Durability)):
        raise ValueError(f"durability must be 'memory', 'fsync' or 'replica', not {durability!r}")
    given = retry_on if isinstance(retry_on, Iterable) and not isinstance(retry_on, str | type) else (retry_on,)
    terms = Terms(int(retries), float(backoff), tuple(_class_name(each) for each in given), float(result_ttl))
    return DurableOptions(float(delay), expires, priority == "batch", terms, durability=durability)


def terms_as_given(options: DurableOptions) -> dict[str, Any]:
    """The options of a durable call as `make_durable_options` takes them."""
    terms = options.terms
    return {
        "delay": options.delay_s,
        "retries": terms.retries,
        "backoff": terms.backoff_s,
        "retry_on": terms.retry_on,
        "expires": options.expires_s,
        "priority": "batch" if options.low_priority else "interactive",
        "result_ttl": terms.result_ttl_s,
        "durability": options.durability,
    }


def _class_name(given: Any) -> str:
    if isinstance(given, str):
        return given
    if isinstance(given, type) and issubclass(given, BaseException):
        return f"{given.__module__}.{given.__qualname__}"
    raise TypeError(f"retry_on takes exception classes and names of them, not {given!r}")


def new_call_id(shard: int = 0) -> str:
    """An id that nobody can guess, unlike those of ordinary calls, which count.

    Args:
        shard: Where Redis is a cluster, the shard of the deployment, by which others find the record.
    """
    return id_in_shard(secrets.token_hex(16), shard)


def id_in_shard(digits: str, shard: int) -> str:
    """The id of a durable call with these digits, of which the first two make room for the shard if there is one."""
    return f"d{shard:02x}{digits[:30]}" if shard else f"d{digits[:32]}"


def is_call_id(text: str) -> bool:
    """Whether a durable call may have this id."""
    return len(text) == 33 and text[0] == "d" and all(letter in "0123456789abcdef" for letter in text[1:])


class Part(msgspec.Struct, frozen=True, array_like=True):
    """One of the values or pieces of a response that a call gives before it has ended.

    Attributes:
        attempt: Which attempt gives it.
        index: Counts the parts of the attempt from 1.
        packed: Whether the data is a packed value; else it is a piece of a response's body.
    """

    attempt: int
    index: int
    packed: bool
    data: bytes


decode_part = decoder_of(Part)


class CallEvent(NamedTuple):
    """Something that happened to a durable call.

    Attributes:
        number: Counts the call's events from 1.
        name: "scheduled", "queued", "started", "retrying" (it failed, and runs again), "progress", or how it ended.
        at: Unix time on Redis' clock.
        data: The attempt of "started", the error of "retrying" or of the end, a sealed frame of "progress".
    """

    number: int
    name: str
    at: float
    data: bytes


class CallRecord(NamedTuple):
    """What is known of a durable call.

    Attributes:
        state: One of the states of this module.
        position: How many calls are to be taken before it, at least; None unless it is queued.
        progress: Sealed frame of what user code reported last.
        submitted, started, ended, due: Unix times on Redis' clock.
        error: Text of the last error, also of one after which it is tried again.
    """

    id: str
    state: str
    deployment: str
    kind: int
    method: str
    attempts: int
    submitted: float
    started: float | None
    ended: float | None
    due: float | None
    position: int | None
    error: str
    progress: bytes | None
    events: tuple[CallEvent, ...]
    last_number: int
    """The number of its last event or part."""
    has_parts: bool
    is_late: bool
    """The call has expired, and nobody has noted that yet."""


def parse_record(call_id: str, answer: Any) -> CallRecord | None:
    """Decode what describe.lua returns."""
    if not answer:
        return None
    fields = dict(zip(answer[0][::2], answer[0][1::2], strict=True))

    def text(name: bytes) -> str:
        return bytes(fields.get(name, b"")).decode("utf-8", "replace")

    def moment(name: bytes) -> float | None:
        return int(fields[name]) / 1000 if name in fields else None

    events = []
    for number, event in zip(answer[2][::2], answer[2][1::2], strict=True):
        name, at, data = event.split(b" ", 2)
        events.append(CallEvent(number, name.decode(), int(at) / 1000, data))
    return CallRecord(
        *(call_id, text(b"state"), text(b"deployment"), int(fields[b"kind"]), text(b"method")),
        *(int(fields[b"attempts"]), moment(b"submitted") or 0.0, moment(b"started"), moment(b"ended"), moment(b"due")),
        *(answer[1] if answer[1] >= 0 else None, text(b"error"), fields.get(b"progress"), tuple(events)),
        *(int(fields.get(b"n", 0)), b"parts" in fields, bool(answer[3])),
    )
