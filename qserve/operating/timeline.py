"""What happened to a durable call, as bars of a waterfall."""

import time
from typing import NamedTuple

from qserve.broker.history.call_index import describe_now
from qserve.broker.instance.state import State
from qserve.wire.call_record import ENDS

_OPENS = {"scheduled": "waits for its time", "queued": "waits in the queue", "retrying": "waits to run again"}


class Step(NamedTuple):
    """One span of a call.

    Attributes:
        kind: "wait", "run" or "end".
        start, share: Where it begins and how much of the whole it takes, from 0 to 1.
    """

    text: str
    kind: str
    at: float
    seconds: float
    start: float
    share: float
    note: str = ""


def timeline(state: State, call_id: str) -> list[Step]:
    """The spans of a call, oldest first; empty if its record is gone.

    Raises:
        BrokerUnavailable, ConfigurationError, CommandRefused: Redis cannot be asked.
    """
    record = describe_now(state.redis, state.keys, call_id)
    if record is None or not record.events:
        return []
    shown = [event for event in record.events if event.name != "progress"]
    if not shown:
        return []
    first, last = shown[0].at, shown[-1].at if record.state in ENDS else time.time()
    whole = max(last - first, 1e-6)
    steps = []
    for place, event in enumerate(shown):
        until = shown[place + 1].at if place + 1 < len(shown) else last
        start, length = (event.at - first) / whole, max(0.0, until - event.at)
        said = event.data.decode("utf-8", "replace") if event.name != "started" else ""
        if event.name in ENDS:
            steps.append(Step(event.name, "end", event.at, 0.0, start, 0.0, said))
        elif event.name == "started":
            attempt = event.data.decode("ascii", "replace")
            steps.append(Step(f"runs, attempt {attempt}", "run", event.at, length, start, length / whole))
        else:
            text = _OPENS.get(event.name, event.name)
            steps.append(Step(text, "wait", event.at, length, start, length / whole, said))
    return steps
