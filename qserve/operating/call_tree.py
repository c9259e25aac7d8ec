"""Which durable calls have made which: the family of one of them."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from qserve.broker.history.call_index import CallSummary, children_of, summaries
from qserve.broker.instance.state import State
from qserve.wire.call_record import is_call_id

_MOST_SHOWN: Final = 200
_DEEPEST: Final = 20


class Relative(NamedTuple):
    """A call of the family, in the order in which a tree is printed.

    Attributes:
        depth: 0 for the call that nobody known has made.
        call: None if its record has expired.
        not_shown: How many calls it has made that are not among the relatives.
    """

    depth: int
    id: str
    call: CallSummary | None
    not_shown: int


def family_of(state: State, call: CallSummary) -> list[Relative]:
    """The calls that led to a durable call, the call, and those that it has made, as far as they are durable and kept.

    Siblings of the call and of those before it are left out; a family of one is empty.

    Raises:
        BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be asked.
    """
    line = [call]
    while len(line) < _DEEPEST and is_call_id(line[0].parent):
        found = summaries(state.redis, state.keys, [line[0].parent])
        if not found:
            break
        line[:0] = found.values()
    made, records = _descendants(state, call)
    relatives = [Relative(depth, each.id, each, 0) for depth, each in enumerate(line[:-1])]
    _add(relatives, call.id, len(relatives), made, records)
    return relatives if len(relatives) > 1 else []


def _descendants(state: State, call: CallSummary) -> tuple[dict[str, tuple[int, list[str]]], dict[str, CallSummary]]:
    """How many calls each has made and the ids of those that are shown, and the records of them all."""
    made: dict[str, tuple[int, list[str]]] = {}
    records = {call.id: call}
    generation: Sequence[str] = [call.id]
    for _ in range(_DEEPEST):
        following: list[str] = []
        for parent, (count, ids) in zip(generation, children_of(state.redis, state.keys, generation), strict=True):
            shown = [each for each in ids if each not in records][: max(0, _MOST_SHOWN - len(records))]
            records |= summaries(state.redis, state.keys, shown)
            made[parent] = count, shown
            following += shown
        if not following:
            break
        generation = following
    return made, records


def _add(
    relatives: list[Relative],
    call_id: str,
    depth: int,
    made: dict[str, tuple[int, list[str]]],
    records: dict[str, CallSummary],
) -> None:
    count, ids = made.get(call_id, (0, []))
    relatives.append(Relative(depth, call_id, records.get(call_id), count - len(ids)))
    for each in ids:
        _add(relatives, each, depth + 1, made, records)
