"""When a replica may take up another user_config: in its turn, and once no call runs that sees the old one."""

import asyncio
import logging
import time

from qserve.wire.spec import Deployed
from qserve_workers.calls.consumer import Consumer
from qserve_workers.replica.birth import Wishes, first_of
from qserve_workers.replica.replica_events import EventWriter, ReconfigureFailed, TurnWanted

logger = logging.getLogger(__name__)

_LEAST_WAIT_S = 1.0
"""Also where calls are not waited for at the end: a busy replica would never reconfigure."""
_MOST_NAMED = 3


class Reconfiguring:
    """Belongs to the replica's event loop.

    Args:
        tag: Tag of the replica.
        changed: Set at every change of the deployment.
    """

    def __init__(
        self, tag: str, consumer: Consumer, wishes: Wishes, changed: asyncio.Event, events: EventWriter
    ) -> None:
        self._tag = tag
        self._consumer = consumer
        self._wishes = wishes
        self._changed = changed
        self._events = events
        self._asked_for = 0

    async def has_turn(self, generation: int) -> bool:
        """Serve on until the parent says it is this replica's turn to reconfigure; False if something else comes."""
        wishes = self._wishes
        if self._asked_for != generation:  # else its turn, which comes only once, may have come in the meantime
            self._asked_for = generation
            wishes.may_serve.clear()
        self._events.tell(TurnWanted(generation=generation))
        await first_of(wishes.may_serve, self._changed, wishes.shall_leave)
        return wishes.may_serve.is_set() and not wishes.shall_leave.is_set()

    async def may_begin(self, deployed: Deployed) -> bool:
        """Wait for the calls in hand, but not for those that stream, which may take as long as they please.

        Returns:
            False where they take longer than the grace time, which the parent is told, or the replica is to leave.
        """
        limit_s = max(deployed.spec.graceful_shutdown_timeout_s, _LEAST_WAIT_S)
        finishing = asyncio.ensure_future(self._consumer.finish(limit_s, streams=False))
        leaving = asyncio.ensure_future(self._wishes.shall_leave.wait())
        try:
            await asyncio.wait((finishing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                return False
            are_done = finishing.result()
        finally:
            finishing.cancel()
            leaving.cancel()
        if not are_done:
            error = (
                f"Replica {self._tag} keeps its old user_config and serves on: after {limit_s:g} s "
                f"(graceful_shutdown_timeout_s) it still runs calls that began under it: {self._what_runs()}. Deploy "
                "again when they have ended, or deploy another version, which replaces the replica"
            )
            logger.info("Deployment %s: %s", deployed.spec.name, error)
            self._events.tell(ReconfigureFailed(generation=deployed.generation, error=f"{error}."))
        return are_done

    def _what_runs(self) -> str:
        now = time.monotonic()
        calls = sorted(
            (each for each in self._consumer.slots.calls if not each.streams), key=lambda each: each.started_at
        )
        named = [f"{each.call.method or '__call__'}, for {now - each.started_at:.0f} s" for each in calls[:_MOST_NAMED]]
        more = [f"and {len(calls) - _MOST_NAMED} more"] if len(calls) > _MOST_NAMED else []
        return "; ".join(named + more) or "calls of dead replicas"
