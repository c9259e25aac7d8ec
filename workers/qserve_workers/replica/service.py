"""A replica while something is deployed: it constructs, takes calls, follows changes, and leaves."""

import asyncio
import logging
import socket
import time
from collections.abc import Sequence
from contextvars import copy_context

from msgspec.structs import replace

from qserve.background import end, spawn
from qserve.broker.instance.heartbeats import call_neighbours, leave
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.server import redis_clients
from qserve.calls.client import Client
from qserve.calls.handles.handle_codec import codec_of
from qserve.calls.process_client import set_current_client
from qserve.context import set_model_watcher
from qserve.errors import BrokerUnavailable, QServeError
from qserve.failpoints import reach
from qserve.hooks import HookChain, ReplicaHook
from qserve.multiplexing import room_for_models
from qserve.settings import Settings
from qserve.tracebacks import users_part
from qserve.wire.exceptions import text_of, traceback_of
from qserve.wire.messages import Control
from qserve.wire.spec import DRAINING, SERVING, STANDBY, STARTING, Deployed
from qserve_workers.calls.consumer import Consumer
from qserve_workers.calls.takeover import Takeover
from qserve_workers.replica.birth import Birth, Wishes, first_of
from qserve_workers.replica.deployment_watch import DeploymentWatch
from qserve_workers.replica.gpus import GpuLedger, gpus_here, wait_for_gpus
from qserve_workers.replica.health import HealthChecks
from qserve_workers.replica.heartbeat import Heartbeat
from qserve_workers.replica.reconfiguring import Reconfiguring
from qserve_workers.replica.replica_events import (
    ConstructionFailed,
    EventWriter,
    HealthLost,
    ReconfigureFailed,
    StillBusy,
)
from qserve_workers.replica.rest import Rest
from qserve_workers.replica.self_description import SelfDescription
from qserve_workers.replica.stalls import StallWatch
from qserve_workers.user.constructor_loop import lend_loop
from qserve_workers.user.environment import set_environment
from qserve_workers.user.user_code import UserCode, load_user_code
from qserve_workers.user.user_entry import enter, what_was_raised
from qserve_workers.user.user_threads import UserThreads

logger = logging.getLogger(__name__)

_QUICK_TIMEOUT_S = 2.0
_LOOK_FOR_GPUS_S = 0.5
_IDLE_WITHIN_S = 0.5
"""How long a replica that may leave when it is idle looks for such a moment."""


class Service:
    """The parts of a replica that serves, and the order in which they start and stop."""

    def __init__(
        self,
        birth: Birth,
        tag: str,
        settings: Settings,
        deployed: Deployed,
        *,
        client: Client,
        watch: DeploymentWatch,
        wishes: Wishes,
        events: EventWriter,
        hooks: Sequence[ReplicaHook],
    ) -> None:
        self._name = birth.deployment
        self._rank = birth.rank
        self._tag = tag
        self._settings = settings
        self._deployed = watch.served = deployed
        self._client = client
        self._watch = watch
        self._wishes = wishes
        self._events = events
        self._codec = codec_of(client)
        self._code: UserCode | None = None
        """None until it is constructed."""
        self._consumer = consumer = Consumer(
            *(settings, client.signer, self._codec, deployed.spec, client.id, client.lending),
            hooks=HookChain(hooks) if hooks else None,
            may_go_on=self._is_current,
        )
        self._about = SelfDescription(
            *(birth, client.id, tag, settings.keys, events), slots=consumer.slots, link=consumer.link
        )
        self._health = HealthChecks(tag, consumer.slots, self._health_changed)
        self._checking: asyncio.Task[None] | None = None
        stalls = StallWatch(tag, consumer.slots, self._health.overdue_s, self._about.publish_problem)
        self._reconfiguring = Reconfiguring(tag, consumer, wishes, watch.changed, events)
        self._takeover = Takeover(settings, consumer, client.id)
        self._heartbeat = Heartbeat(
            *(settings, self._name, client.id),
            entries=lambda: consumer.entries,
            on_lost=consumer.lost,
            on_tick=self._tick,
            on_beat=self._beaten,
            on_look=stalls.look,
        )
        self._rest = Rest(settings, client, consumer, self._heartbeat, self._may_rest)
        set_model_watcher(consumer.affinity)
        client.on_control = self._on_control
        client.take_other_chunks(consumer.take_chunk)

    async def run(self) -> float:
        """Construct, serve until it is time to leave, and leave.

        Returns:
            When its grace time is over, on `time.monotonic`.
        """
        await self._client.start()
        set_current_client(self._client, self._consumer.link.descriptors)
        await self._consumer.connect()
        self._heartbeat.start()
        self._takeover.start()
        self._about.enter(STARTING, self._deployed)
        try:
            code = await self._construct()
            if code is not None:
                await self._take_calls(code)
        finally:
            end_by = time.monotonic() + self._deployed.spec.graceful_shutdown_timeout_s
            await self._leave(end_by)
        return end_by

    async def _construct(self) -> UserCode | None:
        spec = self._deployed.spec
        try:
            set_environment(spec, self._codec)
            if spec.num_gpus and not await self._wait_for_gpus(spec.num_gpus):
                return None
            # Importing may take long and must not stop the loop. What it leaves in its context, or on its thread, is
            # there for the calls.
            context, threads = copy_context(), UserThreads(f"qserve-{spec.name}", spec.max_threads)
            loading = enter(lend_loop, threads.run_and_keep, load_user_code, (spec.target,), {})
            target = await asyncio.get_running_loop().create_task(loading, context=context)
            self._consumer.affinity.expect_models(room_for_models(target))
            self._code = UserCode(*(spec, target, self._tag, self._codec, self._rank), context=context, threads=threads)
            await self._code.construct()
            await self._health.first(self._code)
        except Exception as exc:
            logger.exception("Exception in deployment %r: replica %s could not be constructed", spec.name, self._tag)
            text = text_of(exc) if isinstance(exc, QServeError) else _users_traceback(exc)
            generation = self._deployed.generation
            self._events.tell(ConstructionFailed(generation=generation, revision=spec.revision, error=text))
            return None
        return self._code

    async def _wait_for_gpus(self, wanted: float) -> bool:
        """Whether it has got them, before it was told to leave."""
        leave = self._wishes.shall_leave

        async def pause() -> bool:
            await first_of(leave, timeout=_LOOK_FOR_GPUS_S)
            return not leave.is_set()

        def waits(problem: str) -> None:
            self._about.wait(f"{problem} on {socket.gethostname()}", self._deployed)

        share = await wait_for_gpus(GpuLedger(gpus_here(self._settings.gpus)), wanted, waits, pause)
        if share is None:
            return False
        logger.info("Deployment %s: replica %s has GPU %s", self._name, self._tag, share)
        self._about.gpus = str(share)
        self._about.wait("", self._deployed)
        return True

    async def _take_calls(self, code: UserCode) -> None:
        wishes = self._wishes
        await asyncio.to_thread(wishes.hear)  # the constructor may have sent a signal to its own process
        if wishes.shall_leave.is_set():
            return
        if not wishes.may_serve.is_set():
            self._about.enter(STANDBY, self._deployed)
            await first_of(wishes.may_serve, wishes.shall_leave)
        if wishes.shall_leave.is_set():
            return
        # Nothing runs here yet: the best moment for calls that have to be alone.
        self._consumer.mind_the_dead(True)
        self._start_taking(code)
        self._takeover.sweep()
        self._heartbeat.serve()
        self._about.enter(SERVING, self._deployed)
        self._checking = spawn(self._health.go_on(code))
        changed = self._watch.changed
        while not wishes.shall_leave.is_set():
            await first_of(changed, wishes.shall_leave, wishes.may_leave)
            if changed.is_set():
                changed.clear()
                await self._follow_change(code)
            elif wishes.may_leave.is_set():
                await self._leave_if_idle(code)

    # Changes

    async def _follow_change(self, code: UserCode) -> None:
        try:
            deployed = await self._watch.read()
        except BrokerUnavailable:
            return  # the watch brings a change once Redis is back
        if deployed is not None and deployed.paused != self._deployed.paused:
            self._deployed = self._watch.served = replace(self._deployed, paused=deployed.paused)
            if deployed.paused:
                await self._consumer.pause()
            else:
                self._consumer.start(code)
            logger.info("Deployment %s: %s", self._name, "paused" if deployed.paused else "resumed")
        spec = self._deployed.spec
        if deployed is None:
            if not self._deployed.paused:
                await self._consumer.finish_queue(spec.graceful_shutdown_timeout_s)
            self._wishes.shall_leave.set()
        elif deployed.spec.revision == spec.revision and deployed.generation != self._deployed.generation:
            await self._apply(deployed, code)

    def _start_taking(self, code: UserCode) -> None:
        if not self._deployed.paused:
            self._consumer.start(code)

    async def _apply(self, deployed: Deployed, code: UserCode) -> None:
        """Take up a change that needs no new process."""
        config = deployed.spec.user_config
        if config is None or config == self._deployed.spec.user_config:
            self._follow(deployed)
            self._about.applied(deployed)
        elif await self._reconfiguring.has_turn(deployed.generation):
            # Calls taken before see the old config, calls taken after the new one; meanwhile they wait in the queue.
            await self._consumer.pause()
            try:
                await self._reconfigure(deployed, code, config)
            finally:
                if not self._wishes.shall_leave.is_set():
                    self._start_taking(code)

    async def _reconfigure(self, deployed: Deployed, code: UserCode, config: bytes) -> None:
        if not await self._reconfiguring.may_begin(deployed):
            return
        self._follow(deployed)
        limit = asyncio.timeout(deployed.spec.initialization_timeout_s)
        try:
            async with limit:
                await code.reconfigure(config)
        except Exception as exc:
            logger.exception("Exception in deployment %r: reconfigure failed", self._name)
            took = f"reconfigure took over {deployed.spec.initialization_timeout_s:g} s (initialization_timeout_s)."
            error = took if limit.expired() else _users_traceback(exc)
            self._events.tell(ReconfigureFailed(generation=deployed.generation, error=error))
        else:
            self._about.applied(deployed)

    def _follow(self, deployed: Deployed) -> None:
        self._deployed = self._watch.served = deployed
        self._consumer.slots.spec = deployed.spec

    async def _is_current(self) -> bool:
        """Whether this replica, back from an absence, serves what is deployed, or nobody serves anything newer."""
        if not await self._watch.is_outdated(self._deployed.spec.revision):
            return True
        logger.warning("Deployment %s: replica %s leaves, a newer version serves", self._name, self._tag)
        self._wishes.shall_leave.set()
        return False

    def _on_control(self, about: str, control: Control) -> None:
        if control.verb == "cancel":
            self._consumer.affinity.withdraw(control.entry.encode(), inherited=control.inherited)
        elif control.verb in ("adopt", "take_back"):
            self._consumer.affinity.take(control, about)
        elif control.verb == "leave":
            self._wishes.shall_leave.set()
        elif control.verb == "move":
            self._consumer.mover.wake()
        elif control.verb == "stacks":
            self._consumer.slots.counts.note_stacks()
        else:
            self._takeover.sweep()

    def _health_changed(self) -> None:
        self._about.problem, self._about.is_ill = self._health.problem, self._health.is_ill
        self._about.refresh(self._deployed)
        if self._health.is_ill:
            self._events.tell(HealthLost(error=self._health.problem))

    def _beaten(self, client: redis_clients.Client) -> None:
        self._about.measure(client)
        self._consumer.slots.counts.write(client)

    def _tick(self) -> None:
        self._consumer.slots.counts.take()
        self._consumer.absence.noticed()
        self._consumer.look_for_self_calls(is_only=self._takeover.is_alone)
        self._about.refresh(self._deployed)
        self._rest.look()

    def _may_rest(self) -> bool:
        return self._about.state == SERVING and self._takeover.is_alone and not self._about.is_scaled

    # The end

    async def _leave_if_idle(self, code: UserCode) -> None:
        self._wishes.may_leave.clear()
        if await self._consumer.finish(_IDLE_WITHIN_S):
            await self._consumer.pause()
            if not self._consumer.entries:  # else a call came before the pause
                self._wishes.shall_leave.set()
                return
            self._start_taking(code)
        self._events.tell(StillBusy(running=len(self._consumer.slots)))

    async def _leave(self, end_by: float) -> None:
        self._about.enter(DRAINING, self._deployed)
        await end(self._checking)
        await self._consumer.pause()
        if self._code is not None:
            await self._code.close_websockets()
        if not await self._consumer.finish(self._deployed.spec.graceful_shutdown_timeout_s):
            logger.warning("Deployment %s: %d calls outlived the shutdown", self._name, len(self._consumer.slots))
        await self._takeover.stop()
        all_answered = await self._consumer.stop()
        if self._code is not None:
            await self._code.close(max(end_by - time.monotonic(), _QUICK_TIMEOUT_S))
        self._heartbeat.stop()
        self._consumer.slots.counts.take(at_once=True)
        await asyncio.to_thread(self._say_goodbye, all_answered)
        set_current_client(None)
        await self._client.stop()

    def _say_goodbye(self, all_answered: bool) -> None:
        """Leave nothing behind but calls that were never started, for the neighbours to take."""
        reach("leave")
        keys, replica = self._settings.keys, self._client.id
        client = redis_clients.client(self._settings.redis_url, _QUICK_TIMEOUT_S)
        try:
            self._consumer.slots.counts.write(client)
            if not leave(client, keys, self._name, replica, all_answered=all_answered):
                call_neighbours(client, keys, self._name, replica, self._client.signer)
        except (QServeError, CommandRefused) as exc:
            logger.warning("could not say goodbye: %s", exc)
        finally:
            client.close()


def _users_traceback(error: Exception) -> str:
    return users_part(traceback_of(what_was_raised(error)))
