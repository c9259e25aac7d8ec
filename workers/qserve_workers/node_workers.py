"""The Celery workers of a node: one for each deployment that it serves."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping

from qserve.background import end, spawn
from qserve.broker.instance.change_log import Snapshot
from qserve.broker.instance.heartbeats import call_neighbours, mark_dead
from qserve.broker.instance.reports import forget_worker, read_replicas
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.server import redis_clients
from qserve.errors import QServeError
from qserve.failpoints import reach
from qserve.settings import Settings
from qserve.this_machine import is_running
from qserve.wire.messages import Signer
from qserve.wire.spec import DeploymentSpec, ReplicaInfo
from qserve_workers.children import Process, program
from qserve_workers.node_options import NodeOptions
from qserve_workers.node_template import Template
from qserve_workers.supervise import KeptProcess

logger = logging.getLogger(__name__)

_POLL_S = 0.02
STOP_MARGIN_S = 5.0
"""How long a process may take to end beyond what the calls in it may take."""
_DELETE_MARGIN_S = 1.0
_BURY_WITHIN_S = 10.0
_COMMAND_TIMEOUT_S = 2.0


class NodeWorkers:
    """Starts and stops workers, so that they match what is deployed.

    Args:
        node: Id of the node.
        environment: What its processes find in their environment beside that of the node.
        redis: Whom to ask how far the replicas of a deleted deployment are.
        template: What workers are forked from; None: each is started from nothing.
        changed: Set when a deployment is to be looked at again.
        force: Set when nothing is to be waited for any more.
    """

    def __init__(
        self,
        node: str,
        options: NodeOptions,
        settings: Settings,
        environment: Mapping[str, str],
        redis: redis_clients.AsyncClient,
        template: Template | None,
        *,
        changed: asyncio.Event,
        force: asyncio.Event,
    ) -> None:
        self._node = node
        self._options = options
        self._settings = settings
        self._environment = environment
        self._redis = redis
        self._template = template
        self._changed = changed
        self._force = force
        self._snapshot = Snapshot()
        self._drained = False
        self._running: dict[str, KeptProcess] = {}
        self._specs: dict[str, DeploymentSpec] = {}
        self._retiring: dict[str, asyncio.Task[None]] = {}
        self._burials: dict[str, asyncio.Task[None]] = {}

    def match(self, snapshot: Snapshot, *, drained: bool) -> None:
        """Have a worker for each deployment that this node serves, and no other; none at all where it is drained."""
        self._snapshot = snapshot
        self._drained = drained
        # Also those just deleted: how long their replicas may take to leave is asked later.
        self._specs |= {name: deployed.spec for name, deployed in snapshot.deployments.items()}
        serve = {name for name in snapshot.deployments if self._serves(name)}
        for name in serve - self._running.keys() - self._retiring.keys():
            self._running[name] = KeptProcess(
                f"worker of '{name}'",
                lambda name=name: self._start(name),  # type: ignore[misc]
                on_crash=lambda name=name: self._bury_replicas_of(name),  # type: ignore[misc]
            )
            self._running[name].start()
        for name in self._running.keys() - serve:
            leave = self._put_away if name in snapshot.deployments else self._retire
            self._retiring[name] = asyncio.create_task(leave(name, self._running.pop(name)))

    @property
    def longest_grace_s(self) -> float:
        """How long calls may take to end when all workers stop."""
        return max((self._specs[name].graceful_shutdown_timeout_s for name in self._running), default=0.0)

    async def stop(self) -> None:
        """Let all of them finish their calls and end."""
        stopping = (self._stop(name, worker) for name, worker in self._running.items())
        await asyncio.gather(*stopping, *self._retiring.values())
        await end(*self._burials.values())

    def _serves(self, name: str) -> bool:
        deployed = self._snapshot.deployments.get(name)
        if self._drained or deployed is None or deployed.asleep:
            return False
        return not self._options.only or name in self._options.only

    async def _start(self, name: str) -> Process:
        reach("spawn")
        arguments = self._arguments(name)
        if self._template is not None:
            start = self._template.worker(arguments, signal.SIGTERM)  # when the node dies, they finish their calls
        else:
            command = [sys.executable, "-m", "celery", "-A", "qserve_workers", "worker", *arguments]
            start = program(lambda: command, os.environ | self._environment)
        process = await start()
        reach("spawned")
        return process

    def _arguments(self, name: str) -> list[str]:
        spec = self._specs[name]
        count = 1 if spec.autoscaling else self._options.replicas_per_node or spec.num_replicas
        return [
            *("-Q", name, "-c", str(count)),
            *("-n", f"{name}-{self._node[:8]}@%h", "--loglevel", self._settings.log_level),
            *("--without-gossip", "--without-mingle", "--without-heartbeat"),
        ]

    async def _retire(self, name: str, worker: KeptProcess) -> None:
        """Let the replicas of a deleted deployment finish what is queued, then stop their worker.

        What is queued for a deployment that only this node does not serve any more is for others to run.

        A deployment that is back by then keeps the worker, whose waiting process has taken it up already.
        """
        try:
            grace = self._specs[name].graceful_shutdown_timeout_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace + _DELETE_MARGIN_S):
                    while not worker.ended.is_set() and await self._is_draining(name):  # noqa: ASYNC110 lives in Redis
                        await asyncio.sleep(_POLL_S)
            if self._serves(name):
                self._running[name] = worker
                return
            await self._stop(name, worker)
        finally:
            del self._retiring[name]
            self._changed.set()

    async def _put_away(self, name: str, worker: KeptProcess) -> None:
        """Stop the worker of a deployment that sleeps. If a call has woken it by then, it gets another one."""
        try:
            await self._stop(name, worker)
        finally:
            del self._retiring[name]
            self._changed.set()

    async def _stop(self, name: str, worker: KeptProcess) -> None:
        await worker.stop(self._specs[name].graceful_shutdown_timeout_s + STOP_MARGIN_S, self._force)
        # What a worker that has ended said about itself is true no longer.
        with contextlib.suppress(QServeError, CommandRefused):
            await forget_worker(self._redis, self._settings.keys, name, self._node)

    def _bury_replicas_of(self, name: str) -> None:
        self._burials[name] = spawn(self._bury(name))

    async def _bury(self, name: str) -> None:
        """Let others take over the calls of replicas that died with their worker, which would have told of it."""
        left = {id_: info for id_, info in (await self._replicas(name)).items() if info.node == self._node}
        try:
            async with asyncio.timeout(_BURY_WITHIN_S):
                while left:
                    dead = [id_ for id_, info in left.items() if not is_running(info.pid)]
                    for id_ in dead:
                        del left[id_]
                        await asyncio.to_thread(self._post_tombstone, name, id_)
                    await asyncio.sleep(_POLL_S)
        except (QServeError, CommandRefused, TimeoutError) as exc:  # the silence of their heartbeats tells, too
            logger.debug("could not tell of replicas of %s that died with their worker: %s", name, exc)

    def _post_tombstone(self, name: str, replica: str) -> None:
        with contextlib.closing(redis_clients.client(self._settings.redis_url, _COMMAND_TIMEOUT_S)) as client:
            mark_dead(client, self._settings.keys, name, replica)
            call_neighbours(client, self._settings.keys, name, replica, Signer(self._settings.secrets))

    async def _is_draining(self, name: str) -> bool:
        """Whether replicas of a deleted deployment still run here; those that were killed have left their entry."""
        if name in self._snapshot.deployments:
            return False
        return any(info.node == self._node and is_running(info.pid) for info in (await self._replicas(name)).values())

    async def _replicas(self, name: str) -> dict[str, ReplicaInfo]:
        try:
            return await read_replicas(self._redis, self._settings.keys, name)
        except (QServeError, CommandRefused):
            return {}
