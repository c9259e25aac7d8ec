"""What operators have done: a capped stream, for everybody who may look at the instance."""

from typing import Any, Final, NamedTuple, cast

import redis

from qserve.broker.keys import Keys
from qserve.broker.redis_errors import our_errors

AUDIT_KEPT: Final = 10_000


class Deed(NamedTuple):
    """One action.

    Attributes:
        at: Unix time on Redis' clock.
        who: The operator, as far as it is known, and from where.
        action: What was done, in a word or two.
        about: The deployment, call, schedule, node or replica.
        outcome: What came of it.
    """

    at: float
    who: str
    action: str
    about: str
    outcome: str


def note_deed(client: redis.Redis, keys: Keys, who: str, action: str, about: str, outcome: str) -> None:
    """Write an action into the audit.

    Raises:
        BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be told.
    """
    fields = {"who": who[:200], "action": action[:100], "about": about[:300], "outcome": outcome[:500]}
    with our_errors(client):
        client.xadd(keys.audit, cast("Any", fields), maxlen=AUDIT_KEPT, approximate=True)


def read_deeds(client: redis.Redis, keys: Keys, most: int, before: str = "+") -> list[tuple[str, Deed]]:
    """(id, action), the newest first; raises like `note_deed`."""
    with our_errors(client):
        found = cast("Any", client.xrevrange(keys.audit, before if before == "+" else f"({before}", "-", count=most))
    deeds = []
    for entry, fields in found:
        text = {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()}
        words = (text.get(name, "") for name in ("who", "action", "about", "outcome"))
        deeds.append((entry.decode(), Deed(int(entry.split(b"-")[0]) / 1000, *words)))
    return deeds
