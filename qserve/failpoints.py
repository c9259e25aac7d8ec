"""Points at which a process can be made to die, so that tests can show what becomes of the calls it has.

QSERVE_FAILPOINT names them: `NAME:NTH` kills the process (SIGKILL, by itself) when it passes the point for the NTH
time, `NAME:NTH:stop` freezes it (SIGSTOP). Several are separated by commas. Every process counts for itself.
"""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping

VARIABLE = "QSERVE_FAILPOINT"

POINTS: Mapping[str, str] = {
    # whoever calls
    "admit": "a caller is about to put calls on a queue",
    "admit-sent": "it has sent them to Redis, which has not answered yet",
    "admitted": "Redis has answered, and the caller has not looked at it",
    "result-announced": "a caller has the reply to a call, but not its large result, which travels apart",
    "chunk-arrived": "a caller has got a part of a streamed result and has not passed it on",
    "submit": "a caller is about to submit durable calls",
    "submit-sent": "it has sent them to Redis, which has not answered yet",
    "submitted": "Redis has answered, and whoever submits has not been told",
    "end-call": "somebody is about to cancel a durable call, or to let it expire",
    "end-call-sent": "that is sent",
    # gateways
    "respond": "a gateway has the outcome of a call and has sent nothing of the response",
    # replicas
    "taken": "a replica has read calls from its queue and started none of them",
    "payload-fetched": "it has got the large payload of a call, which travels apart, and has not run it",
    "run": "it is about to run a call",
    "ran": "user code has ended, and nobody knows",
    "reply": "answers are about to be sent",
    "reply-sent": "they are sent, and not confirmed",
    "replied": "Redis has confirmed them",
    "chunk": "a replica is about to send a part of a streamed result",
    "chunk-sent": "the part is sent",
    "note-start": "a replica has taken over a call and is about to note that it starts it again",
    "start-noted": "that is noted, and the call does not run yet",
    "bury": "a replica is about to give up a call for good",
    "buried": "the call is among the dead letters, and its caller is told",
    "take": "a replica has found a neighbour dead and is about to take over its calls",
    "took": "it has them, and has done nothing with them",
    "retire": "it is about to forget the neighbour, whose calls are all taken",
    "beat": "the thread of the heartbeats is about to send one",
    "leave": "a replica that was told to leave has drained and is about to say goodbye",
    # replicas and durable calls
    "run-noted": "the record of a durable call says that it runs, and it does not yet",
    "settle": "the end of a durable call is about to be sent",
    "settle-sent": "it is sent, and not confirmed",
    "settled": "Redis has confirmed it",
    "due": "a replica is about to queue the durable calls whose time has come",
    "moved": "they are queued",
    # whoever sends dead letters again
    "revive": "a dead letter is about to be sent again",
    "revived": "it is queued again",
    # workers, nodes and drivers
    "tombstone": "a worker has seen one of its replicas die and has told nobody",
    "tombstone-set": "it has told Redis, but not the neighbours",
    "celery-read": "a worker has read a message of a Celery client and is about to make a durable call of it",
    "celery-taken": "the call has its record, and the message still stands in Celery's queue",
    "spawn": "a node is about to start a worker",
    "spawned": "it has started one",
    "deploy": "a driver is about to write what shall be deployed",
    "deployed": "that is written, and the driver does not wait for it yet",
}
"""Every point there is, and where it is. At those called `-sent` a process dies in the next turn of its event loop,
when what it has written has left it."""

_SIGNALS = {"": signal.SIGKILL, "stop": signal.SIGSTOP}


class Armed:
    """Counts how often this process passes the points it shall not survive."""

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
        """Pass a point, perhaps for the last time."""
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
    """Nobody shall die: a call of this takes 30 ns, and there are a dozen on the path of a call."""


reach: Callable[[str], None] = Armed(os.environ[VARIABLE]).reach if os.environ.get(VARIABLE) else _go_on
