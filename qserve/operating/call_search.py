"""Finding durable calls by what is known of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from qserve.broker.history.call_index import ABOVE_ALL, STATES, CallSummary, Entry, ids_of_key, newest_ids, summaries
from qserve.broker.instance.state import State
from qserve.errors import CallNotFound
from qserve.wire.call_record import is_call_id

PAGE = 50
_SCANNED_AT_ONCE, _MOST_SCANNED = 200, 2_000


@dataclass(frozen=True)
class CallFilter:
    """Which calls to list; what is empty does not matter.

    Attributes:
        states: Some of STATES.
        deployment: Name of the deployment.
        method: Name of the method.
        error: A part of the text of the last error, in any case of letters.
        key: Its idempotency key, the whole of it.
        since: Unix time; only calls that entered their state since then.
        before: Only calls that come behind this one in a list; of one moment there may be many.
    """

    states: tuple[str, ...] = ()
    deployment: str = ""
    method: str = ""
    error: str = ""
    key: str = ""
    since: float = 0.0
    before: Entry = ABOVE_ALL

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
            and (not self.key or call.key == self.key)
        )


class Found(NamedTuple):
    """Calls, the newest first.

    Attributes:
        next_before: `before` of the next ones; None if there are none.
        is_cut: The search ended at its limit, so that there may be more although few were found.
    """

    calls: list[tuple[float, CallSummary]]
    next_before: Entry | None
    is_cut: bool = False


def find_calls(state: State, wanted: CallFilter, most: int = PAGE) -> Found:
    """Find durable calls. It looks at 2,000 calls at most, however many there are.

    Raises:
        ValueError: There is no such state.
        BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be asked.
    """
    wanted.check()
    if wanted.key:
        return _with_key(state, wanted, most)
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
                    return Found(calls, (calls[-1][0], calls[-1][1].id))
                calls.append((at, record))
        if len(ids) < _SCANNED_AT_ONCE:
            return Found(calls, None)
        before = ids[-1]
    return Found(calls, before, is_cut=True)


def _with_key(state: State, wanted: CallFilter, most: int) -> Found:
    records = summaries(state.redis, state.keys, ids_of_key(state.redis, state.keys, wanted.key)).values()
    calls = [(call.ended or call.started or call.submitted, call) for call in records if wanted.fits(call)]
    fitting = [(at, call) for at, call in calls if wanted.since <= at and (at, call.id) < wanted.before]
    fitting.sort(reverse=True)
    return Found(fitting[:most], None)


def known_calls(state: State, ids: Iterable[str]) -> dict[str, CallSummary]:
    """The records in short of those of the ids that are ids of durable calls and have one. Raises as `find_calls`."""
    return summaries(state.redis, state.keys, [each for each in ids if is_call_id(each)])


def find_call(state: State, call_id: str) -> CallSummary:
    """The record of a call in short.

    Raises:
        CallNotFound: There is none, or none any more.
        BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be asked.
    """
    found = known_calls(state, [call_id])
    if call_id not in found:
        raise CallNotFound(f"there is no durable call {call_id[:100]!r}, or its record has expired")
    return found[call_id]
