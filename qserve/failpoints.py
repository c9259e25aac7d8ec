"""Points at which a process can be made to die, so that tests can show what becomes of the calls it has.

QSERVE_FAILPOINT names them: `NAME:NTH` kills the process (SIGKILL, by itself) when it passes the point for the NTH
time, `NAME:NTH:stop` freezes it (SIGSTOP). Several points are separated by commas. Every process counts on its own.
"""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping

VARIABLE = "QSERVE_FAILPOINT"

POINTS: Mapping[str, str] = {
    # whoever calls
    "admit": "A caller is about to put calls on a queue.",
    "admit-sent": "A caller has sent calls to Redis, which has not answered yet.",
    "admitted": "Redis has answered, and the caller has not looked at the answer.",
    "result-announced": "A caller has the reply to a call, but not yet its large result, which is stored apart.",
    "chunk-arrived": "A caller has received a part of a streamed result, and has not passed it on.",
    "submit": "A caller is about to submit durable calls.",
    "submit-sent": "A caller has sent durable calls to Redis, which has not answered yet.",
    "submitted": "Redis has answered, and whoever submits the durable call has not been told.",
    "end-call": "Somebody is about to cancel a durable call, or to let it expire.",
    "end-call-sent": "The cancellation or expiry of a durable call has been sent to Redis.",
    # gateways
    "respond": "A gateway has the outcome of a call, and has sent nothing of the response.",
    # replicas
    "taken": "A replica has read calls from its queue, and has started none of them.",
    "payload-fetched": "A replica has fetched the large payload of a call, which is stored apart, and has not run it.",
    "run": "A replica is about to run a call.",
    "ran": "User code has ended, and nobody knows it yet.",
    "reply": "A replica is about to send answers.",
    "reply-sent": "A replica has sent answers, which are not confirmed yet.",
    "replied": "Redis has confirmed the answers of a replica.",
    "chunk": "A replica is about to send a part of a streamed result.",
    "chunk-sent": "A replica has sent a part of a streamed result.",
    "note-start": "A replica has taken over a call, and is about to note that it starts the call again.",
    "start-noted": "It is noted that a call starts again, and the call does not run yet.",
    "bury": "A replica is about to give up a call for good.",
    "buried": "A call is among the dead letters, and its caller has been told.",
    "take": "A replica has found another one dead, and is about to take over its calls.",
    "took": "A replica has taken over the calls of a dead one, and has done nothing with them.",
    "retire": "A replica is about to forget a dead one, whose calls are all taken over.",
    "beat": "The thread that sends heartbeats is about to send one.",
    "leave": "A replica that was told to leave has finished its calls, and is about to sign off.",
    # replicas and durable calls
    "run-noted": "The record of a durable call says that the call runs, and it does not run yet.",
    "settle": "A replica is about to send the end of a durable call.",
    "settle-sent": "A replica has sent the end of a durable call, which is not confirmed yet.",
    "settled": "Redis has confirmed the end of a durable call.",
    "due": "A replica is about to queue the durable calls whose time has come.",
    "moved": "The durable calls whose time has come are queued.",
    # whoever sends dead letters again
    "revive": "A dead letter is about to be sent again.",
    "revived": "A dead letter has been queued again.",
    # workers, nodes and drivers
    "tombstone": "A worker has seen one of its replicas die, and has told nobody.",
    "tombstone-set": "A worker has told Redis that one of its replicas died, but not the other replicas.",
    "celery-read": "A worker has read a message of a Celery client, and is about to make a durable call of it.",
    "celery-taken": "The call of a Celery client has its record, and the message is still in Celery's queue.",
    "spawn": "A node is about to start a worker.",
    "spawned": "A node has started a worker.",
    "deploy": "A driver is about to write what is to be deployed.",
    "deployed": "A driver has written what is to be deployed, and does not wait for it yet.",
}
"""All points, and where they are. At one whose name ends in `-sent`, a process dies in the next turn of its event loop,
when it has sent what it has written."""

_SIGNALS = {"": signal.SIGKILL, "stop": signal.SIGSTOP}


class Armed:
    """The points at which this process is to be killed or frozen, and how often it has passed each."""

    def __init__(self, wanted: str) -> None:
        self._acts: dict[tuple[str, int], signal.Signals] = {}
        self._passed: Counter[str] = Counter()
        for each in wanted.split(","):
            name, _, rest = each.partition(":")
            nth, _, action = rest.partition(":")
            if name not in POINTS or not nth.isdecimal() or int(nth) < 1 or action not in _SIGNALS:
                raise ValueError(
                    f"{VARIABLE}={wanted!r}: {each!r} is not NAME:NTH or NAME:NTH:stop with a name of "
                    f"{', '.join(POINTS)}. Unset it outside of tests."
                )
            self._acts[name, int(nth)] = _SIGNALS[action]

    def reach(self, point: str) -> None:
        """Pass a point, and be killed or frozen there if it is time."""
        self._passed[point] += 1
        number = self._acts.get((point, self._passed[point]))
        if number is None:
            return
        if point.endswith("-sent"):
            asyncio.get_running_loop().call_soon(self._act, point, number)
        else:
            self._act(point, number)

    def _act(self, point: str, number: signal.Signals) -> None:
        said = f"failpoint {point}: {number.name} for pid {os.getpid()}\n"
        os.write(2, said.encode())  # a buffer would die with the process
        os.kill(os.getpid(), number)


def _go_on(point: str) -> None:
    """Do nothing: no point is armed. This takes 30 ns, and the path of a call has a dozen of them."""


reach: Callable[[str], None] = Armed(os.environ[VARIABLE]).reach if os.environ.get(VARIABLE) else _go_on
