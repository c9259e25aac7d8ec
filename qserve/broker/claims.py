"""Claims: which calls that may not run twice have been run, one bit for each, kept for twice its time."""

from collections.abc import Callable, Sequence
from typing import Final

from qserve.broker.connection import Answer, Connection
from qserve.broker.keys import Keys
from qserve.broker.scripts import CLAIM

_CALLER: Final = 32
"""Of a call's id so many characters name the process that made it; the rest counts its calls."""
_CALLS_PER_KEY: Final = 32_768
_GRACE_MS: Final = 60_000
_LONGEST_MS: Final = 7 * 86_400_000


def send_claims(
    connection: Connection, keys: Keys, calls: Sequence[tuple[str, int]], on_answer: Callable[[Answer], None]
) -> None:
    """Claim calls, given as (id, time left in ms); `on_answer` gets a 1 for each that nobody has claimed before."""
    names: list[str] = []
    arguments: list[int] = []
    for call_id, ttl_ms in calls:
        caller, number = _parts(call_id)
        names.append(keys.claims(caller, number // _CALLS_PER_KEY))
        arguments += (number % _CALLS_PER_KEY, min(ttl_ms + _GRACE_MS, _LONGEST_MS))
    CLAIM.send(connection, on_answer, tuple(names), *arguments)


def _parts(call_id: str) -> tuple[str, int]:
    try:
        return call_id[:_CALLER], int(call_id[_CALLER:], 16)
    except ValueError:  # not one that a client of ours makes
        return call_id, 0
