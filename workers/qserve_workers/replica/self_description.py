"""What a replica lets others know about itself: everybody by Redis, and its worker by events."""

import logging
import os
import socket
import time

from msgspec.structs import replace

from qserve.broker.instance.heartbeats import measure
from qserve.broker.instance.reports import report_replica, send_replica_report
from qserve.broker.keys import Keys
from qserve.broker.link import Link
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.server import redis_clients
from qserve.errors import QServeError
from qserve.telemetry.user_metrics import current_gauges
from qserve.wire.spec import SERVING, UNHEALTHY, Deployed, ReplicaInfo
from qserve_workers.calls.slots import Slots
from qserve_workers.replica.birth import Birth
from qserve_workers.replica.replica_events import (
    CallsCounted,
    ChangeApplied,
    DemandMeasured,
    EventWriter,
    StateEntered,
)

logger = logging.getLogger(__name__)


class SelfDescription:
    """The replica as others see it. Belongs to its event loop, except for `measure` and `publish_problem`.

    Attributes:
        state: What it does, one of those in `qserve.wire.spec`.
        problem: What is wrong with the replica, as its event loop knows it; "" if nothing is.
        is_ill: Whether it is to be replaced for that.
        gpus: The GPUs that it has.
    """

    def __init__(
        self, birth: Birth, replica: str, tag: str, keys: Keys, events: EventWriter, *, slots: Slots, link: Link
    ) -> None:
        self.state = ""
        self.problem = ""
        self.is_ill = False
        self.gpus = ""
        self._birth = birth
        self._id = replica
        self._tag = tag
        self._keys = keys
        self._events = events
        self._slots = slots
        self._link = link
        self._started_at = time.time()
        self._published: ReplicaInfo | None = None
        self._published_at_loss = 0

    def enter(self, state: str, deployed: Deployed) -> None:
        """Be in a state from now on."""
        self.state = state
        self._publish(deployed)
        generation, revision = deployed.generation, deployed.spec.revision
        self._events.tell(StateEntered(state=state, generation=generation, revision=revision))
        place = (self._birth.deployment, self._tag, os.getpid())
        logger.info("Deployment %s: replica %s (pid %d) is %s", *place, state)

    def wait(self, problem: str, deployed: Deployed) -> None:
        """Wait for something, or no more, before the construction begins; its time begins anew."""
        if problem and problem != self.problem:
            logger.warning("Deployment %s: replica %s %s", self._birth.deployment, self._tag, problem)
        self.problem = problem
        self._publish(deployed)
        generation, revision = deployed.generation, deployed.spec.revision
        self._events.tell(StateEntered(state=self.state, generation=generation, revision=revision))

    def applied(self, deployed: Deployed) -> None:
        """Serve another generation from now on."""
        self._publish(deployed)
        self._events.tell(ChangeApplied(generation=deployed.generation))

    def refresh(self, deployed: Deployed) -> None:
        """Let others know what has changed since the last time."""
        before = self._published
        self._publish(deployed)
        after = self._published
        if before is not None and after is not None and before.handled != after.handled:
            self._events.tell(CallsCounted(running=after.running, handled=after.handled))

    @property
    def is_scaled(self) -> bool:
        """Whether the worker wants to know what there is to do."""
        return self._birth.scaled or self._slots.spec.autoscaling is not None

    def measure(self, client: redis_clients.Client) -> None:
        """Tell the worker what there is to do, if it wants to know. For the heartbeat thread."""
        if not self.is_scaled:
            return
        try:
            demand = measure(client, self._keys, self._birth.deployment)
        except (QServeError, CommandRefused) as exc:  # the number of replicas stays as it is meanwhile
            logger.debug("could not measure the load: %s", exc)
            return
        nodes, node = demand.nodes, self._birth.node
        place = nodes.index(node) if node in nodes else len(nodes)
        self._events.tell(
            DemandMeasured(
                calls=demand.calls,
                waited_s=demand.waited_s,
                place=place,
                nodes=max(len(nodes), place + 1),
                running=len(self._slots),
            )
        )

    def publish_problem(self, client: redis_clients.Client, state: str, problem: str) -> None:
        """Let others know what the event loop cannot tell, because it is blocked. For the heartbeat thread.

        Raises:
            QServeError, CommandRefused: Redis cannot be told.
        """
        info, self._published = self._published, None  # the loop tells when it is over
        if info is not None:
            report_replica(client, self._keys, self._birth.deployment, replace(info, state=state, problem=problem))

    def _publish(self, deployed: Deployed) -> None:
        times = sorted(self._slots.run_times_ms)
        info = ReplicaInfo(
            id=self._id,
            tag=self._tag,
            worker=self._birth.worker,
            node=self._birth.node,
            host=socket.gethostname(),
            pid=os.getpid(),
            generation=deployed.generation,
            revision=deployed.spec.revision,
            state=UNHEALTHY if self.is_ill and self.state == SERVING else self.state,
            started_at=self._started_at,
            running=len(self._slots),
            handled=self._slots.handled,
            p50_ms=round(times[len(times) // 2], 3) if times else None,
            p99_ms=round(times[len(times) * 99 // 100], 3) if times else None,
            problem=self.problem,
            gpus=self.gpus,
            gauges=current_gauges(),
        )
        sender, losses = self._link.sender, self._link.losses
        if (info != self._published or losses != self._published_at_loss) and sender.is_open:
            self._published, self._published_at_loss = info, losses
            send_replica_report(sender, self._keys, self._birth.deployment, self._id, info)
