"""The Lua scripts: each is a file in `lua/`, begins with its name, and has the constant of that name here.

The first lines of a file say what the script does, which keys and arguments it takes and what it returns.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import NoScriptError

from qserve.broker.connection import Answer, Connection, ignore_answer, settle
from qserve.broker.redis_errors import ASK_AGAIN_S, MOVES_WITHIN_S, CommandRefused, NotTaken, StillMoving, is_moving

if TYPE_CHECKING:
    import redis
    import redis.asyncio

_FOLDER: Final = Path(__file__).parent / "lua"
_SHEBANG: Final = "#!lua flags=allow-oom\n"

_TOO_LONG: Final = (
    f"Redis has been moving the keys for more than {MOVES_WITHIN_S:g} s, and this was not done: see CLUSTER NODES"
)


class Script:
    """A Lua script called by its hash, and loaded where the server does not know it (yet, or any more)."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()

    def send(
        self,
        connection: Connection,
        on_answer: Callable[[Answer], None],
        keys: tuple[str, ...],
        *args: Any,
        again_on: Connection | None = None,
    ) -> None:
        """Run the script at the end of this tick.

        A script the server has forgotten is sent again whole: NOSCRIPT means that nothing was done, so this is no
        blind retry.

        Args:
            again_on: The connection on which it is sent again, where a blocking read follows it on `connection`.
        """

        def check(answer: Answer) -> None:
            if not isinstance(answer, CommandRefused):
                on_answer(answer)
            elif str(answer).startswith("NOSCRIPT"):
                (again_on or connection).send(on_answer, "EVAL", self.source, len(keys), *keys, *args)
            elif is_moving(answer):
                other, until = again_on or connection, time.monotonic() + MOVES_WITHIN_S
                again = partial(self._send_again, other, on_answer, keys, args, until)
                asyncio.get_running_loop().call_later(ASK_AGAIN_S, again)
            else:
                on_answer(answer)

        connection.send(check, "EVALSHA", self.sha, len(keys), *keys, *args)

    def _send_again(
        self,
        connection: Connection,
        on_answer: Callable[[Answer], None],
        keys: tuple[str, ...],
        args: tuple[Any, ...],
        until: float,
    ) -> None:
        """Run a script that a cluster has refused because its keys are being moved one by one."""

        def check(answer: Answer) -> None:
            if not (isinstance(answer, CommandRefused) and is_moving(answer)):
                on_answer(answer)
            elif time.monotonic() > until:
                on_answer(StillMoving(_TOO_LONG))
            else:
                again = partial(self._send_again, connection, on_answer, keys, args, until)
                asyncio.get_running_loop().call_later(ASK_AGAIN_S, again)

        if connection.is_open:
            connection.send(check, "EVAL", self.source, len(keys), *keys, *args)
        else:
            on_answer(NotTaken("the keys have moved to another server of the cluster, and this was not done"))

    async def call(self, connection: Connection, keys: tuple[str, ...], *args: Any) -> Answer:
        """Run the script and return its answer; raises like `Connection.call`."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.send(connection, lambda answer: settle(future, answer), keys, *args)
        return await future

    def run(self, client: "redis.Redis", keys: tuple[str, ...], *args: Any) -> Any:
        """Run the script over redis-py, for what is not on the path of a call; raises redis-py's errors."""
        try:
            return client.evalsha(self.sha, len(keys), *keys, *args)
        except NoScriptError:
            return client.eval(self.source, len(keys), *keys, *args)

    async def run_async(self, client: "redis.asyncio.Redis", keys: tuple[str, ...], *args: Any) -> Any:
        """Like `run`, on an event loop."""
        try:
            return await client.evalsha(self.sha, len(keys), *keys, *args)
        except NoScriptError:
            return await client.eval(self.source, len(keys), *keys, *args)


def load_scripts(connection: Connection, scripts: Iterable[Script]) -> None:
    """Load scripts whose order matters; one that is loaded on its first use is overtaken by what is sent next."""
    for script in scripts:
        connection.send(ignore_answer, "SCRIPT", "LOAD", script.source)


def _read(name: str, *shared: str) -> Script:
    """The script of a file, preceded by what it shares with others."""
    source = (_FOLDER / f"{name}.lua").read_text()
    head = _SHEBANG if source.startswith(_SHEBANG) else ""  # this line has to be the first one
    parts = [(_FOLDER / f"{each}.lua").read_text() for each in shared]
    return Script("".join([head, *parts, source.removeprefix(head)]))


_RECORDS: Final = "shared_records"
_DEAD_LETTERS: Final = "shared_dead_letters"
_DEPLOYMENTS: Final = "shared_deployments"
_QUEUES: Final = "shared_queues"

# Calls on their way to a replica and back
ADMIT: Final = _read("admit")
ADOPT: Final = _read("adopt")
CANCEL: Final = _read("cancel")
CLAIM: Final = _read("claim")
FIND: Final = _read("find")
GIVE_UP: Final = _read("give_up", _DEAD_LETTERS)
HAND_OVER: Final = _read("hand_over")
HOLD_MODELS: Final = _read("hold_models")
REPLY: Final = _read("reply")
START_AGAIN: Final = _read("start_again")
TAKE: Final = _read("take")

# Inboxes, and who is there
BEAT: Final = _read("beat")
DEMAND: Final = _read("demand", _QUEUES)
EPOCH: Final = _read("epoch")
PRESENT: Final = _read("present")
RETIRE: Final = _read("retire")
TELL: Final = _read("tell")
TRIM: Final = _read("trim")

# Durable calls
ATTACH: Final = _read("attach", _RECORDS)
DESCRIBE: Final = _read("describe", _RECORDS)
DUE: Final = _read("due", _RECORDS)
END_CALL: Final = _read("end_call", _RECORDS)
NOTE_CHILD: Final = _read("note_child", _RECORDS)
NOTE_PART: Final = _read("note_part", _RECORDS)
NOTE_PROGRESS: Final = _read("note_progress", _RECORDS)
REJECT_CALL: Final = _read("reject_call", _RECORDS, _DEAD_LETTERS)
REVIVE: Final = _read("revive", _RECORDS)
RUN_AGAIN: Final = _read("run_again", _RECORDS)
RUN_CALL: Final = _read("run_call", _RECORDS)
SETTLE_CALL: Final = _read("settle_call", _RECORDS, _DEAD_LETTERS)
SUBMIT: Final = _read("submit", _RECORDS)

# What is counted
ADD_SERIES: Final = _read("add_series")
COUNT_CALLS: Final = _read("count_calls", _QUEUES)

# The queue of Celery clients
LEASE: Final = _read("lease")
RELEASE: Final = _read("release")

# The desired state
DELETE: Final = _read("delete")
DEPLOY: Final = _read("deploy", _DEPLOYMENTS)
PAUSE: Final = _read("pause")
RESTORE: Final = _read("restore", _DEPLOYMENTS)
SET_STATE: Final = _read("set_state")
SIGN: Final = _read("sign")
SLEEP: Final = _read("sleep")
