"""One replica of one deployment: a process' worth of user code between the queue and its callers."""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from qserve.background import end, spawn
from qserve.broker.instance.following import connect_asyncio, follow, last_log_id, read_meta
from qserve.broker.instance.heartbeats import call_neighbours, leave, measure
from qserve.broker.instance.reports import read_replicas, send_replica_report
from qserve.broker.instance.restoring import restore
from qserve.broker.instance.state import decode_deployed
from qserve.broker.redis_errors import CommandRefused
from qserve.broker.server import redis_clients
from qserve.calls.client import Client
from qserve.calls.handle import codec_of
from qserve.calls.process_client import new_event_loop, set_current_client
from qserve.deployments.loading import load_target
from qserve.errors import BrokerUnavailable, ConfigurationError, FrameRejected, QServeError
from qserve.failpoints import reach
from qserve.hooks import ReplicaHook, load_hooks
from qserve.settings import Settings
from qserve.wire.messages import Control
from qserve.wire.spec import DRAINING, SERVING, STANDBY, STARTING, Deployed, ReplicaInfo
from qserve_workers.replica.consumer import Consumer
from qserve_workers.replica.heartbeat import Heartbeat
from qserve_workers.replica.takeover import Takeover
from qserve_workers.replica.user_code import UserCode
from qserve_workers.replica.user_entry import enter, what_was_raised

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.1, 10.0
_LONGEST_ERROR = 3000
_QUICK_TIMEOUT_S = 2.0
_IDLE_WITHIN_S = 0.5
"""How long a replica that may leave when it is idle looks for such a moment."""


@dataclass(frozen=True)
class Birth:
    """What the parent tells a replica when it forks it.

    Attributes:
        worker, node: Ids of the Celery worker and of the node it belongs to.
        standby: Construct, then wait for `ReplicaProcess.serve` before taking calls.
        failures: Constructor failures so far; the replica waits accordingly before it tries.
        reports_fd: Pipe for reports to the parent, one JSON line each.
        scaled: Report what there is to do, whatever the deployment says.
    """

    deployment: str
    worker: str
    node: str
    standby: bool
    failures: int
    reports_fd: int
    scaled: bool = False


class ReplicaProcess:
    """The replica of this process, on a thread with an event loop of its own."""

    def __init__(self, birth: Birth, settings: Settings) -> None:
        self._birth = birth
        self._settings = settings
        self._drained = threading.Event()
        self._thread = threading.Thread(target=self._run, name="qserve-replica", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._replica: Replica | None = None
        self._ready = threading.Event()

    def start(self) -> None:
        """Start the replica's thread and return at once."""
        self._thread.start()

    def serve(self) -> None:
        """Let a standby replica take calls, or one that asked for its turn reconfigure. From any thread."""
        self._tell(lambda replica: replica.may_serve.set())

    def release(self) -> None:
        """Leave at the next moment without a call in hand; if none comes soon, say so and stay. From any thread."""
        self._tell(lambda replica: replica.may_leave.set())

    def drain(self) -> None:
        """Finish the calls in hand, hand back the rest, and end. From any thread; again without effect."""
        self._tell(lambda replica: replica.shall_leave.set())

    def wait_drained(self, timeout: float | None) -> bool:
        """Whether the replica has ended within `timeout` seconds."""
        return self._drained.wait(timeout)

    def _tell(self, action: Any) -> None:
        self._ready.wait()
        if self._loop is not None and self._replica is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: there is nothing left to tell
                self._loop.call_soon_threadsafe(action, self._replica)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                self._run_to_the_end(runner.get_loop())
        except BaseException:
            logger.exception("the replica of %s failed", self._birth.deployment)
        finally:
            self._ready.set()
            self._drained.set()
            # Ends the main thread, and with it the process, where nobody asked for it; a drained replica has nothing
            # left to do for whoever did.
            os.kill(os.getpid(), signal.SIGTERM)

    def _run_to_the_end(self, loop: asyncio.AbstractEventLoop) -> None:
        main = loop.create_task(self._main())
        while not main.done():
            try:
                loop.run_until_complete(main)
            except (SystemExit, KeyboardInterrupt) as exc:
                # Raised in a task that user code has started, these two stop the loop; whoever awaits that task gets
                # them, too. Nothing is lost: the loop goes on where it was.
                if not main.done():
                    logger.error("Deployment %s: a task of user code raised", self._birth.deployment, exc_info=exc)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._replica = Replica(self._birth, self._settings)
        self._ready.set()
        await self._replica.live()


class Replica:
    """The life of a replica: wait for a deployment, construct, serve, follow changes, leave."""

    def __init__(self, birth: Birth, settings: Settings) -> None:
        self.may_serve = asyncio.Event()
        self.may_leave = asyncio.Event()
        self.shall_leave = asyncio.Event()
        self._birth = birth
        self._name = birth.deployment
        self._settings = settings
        self._keys = settings.keys
        self._client = Client(settings)
        self._id = self._client.id
        self._tag = f"{self._name}#{secrets.token_hex(4)}"
        self._codec = codec_of(self._client)
        self._redis = connect_asyncio(settings.redis_url)
        self._started_at = time.time()
        self._deployed: Deployed | None = None
        self._state = ""
        self._published: ReplicaInfo | None = None
        self._published_at_loss = 0
        self._changed = asyncio.Event()
        self._code: UserCode
        self._consumer: Consumer
        self._takeover: Takeover
        self._heartbeat: Heartbeat
        if not birth.standby:
            self.may_serve.set()

    async def live(self) -> None:
        """From birth to the end."""
        follower = spawn(self._follow(await last_log_id(self._redis, self._keys)))
        try:
            deployed = await self._until_deployed()
            if deployed is None:
                return
            await self._backoff()
            if self.shall_leave.is_set():
                return
            await self._serve(await self._read_state() or deployed)
        finally:
            await end(follower)
            await self._redis.aclose()

    # Finding out what to run

    async def _follow(self, from_id: str) -> None:
        """Tell the parent of every change, whatever this replica is busy with: a constructor may hang."""
        async for change in follow(self._settings.redis_url, self._keys, from_id):
            if change.name in ("", self._name):
                with contextlib.suppress(BrokerUnavailable):  # a resync follows
                    deployed = await self._read_state()
                    if deployed is None:
                        self._report("deleted")
                    else:
                        self._report_deployed(deployed)
                self._changed.set()

    async def _until_deployed(self) -> Deployed | None:
        """The deployment, as soon as there is one; None when told to leave first."""
        while not self.shall_leave.is_set():
            self._changed.clear()
            deployed = await self._read_state()
            if deployed is not None:
                self._report_deployed(deployed)
                return deployed
            await self._first_of(self._changed, self.shall_leave, timeout=5.0)
        return None

    async def _read_state(self) -> Deployed | None:
        """The desired state, None when there is none; a spec that no key of ours signed changes nothing."""
        with _unavailable_if_refused():
            meta = await read_meta(self._redis, self._keys, self._name)
        try:
            if meta[0] is None and self._deployed is not None:  # deleting leaves the generation
                return await self._remember(self._deployed)
            return decode_deployed(self._client.signer, self._name, meta)
        except FrameRejected as exc:
            logger.error("Ignoring the spec of deployment %r: %s", self._name, exc)
            return self._deployed

    async def _remember(self, deployed: Deployed) -> Deployed:
        """The server has lost what was deployed: that is no wish to end it."""
        if self._settings.autorestore and await restore(self._redis, self._keys, self._client.signer, [deployed]):
            logger.warning("Deployment %s: Redis has lost it; it was put back", self._name)
        return deployed

    async def _backoff(self) -> None:
        """Wait before another try after failed constructors; a new deploy is tried at once."""
        if self._birth.failures:
            delay = min(_FIRST_BACKOFF_S * 2 ** (self._birth.failures - 1), _LONGEST_BACKOFF_S)
            await self._first_of(self._changed, self.shall_leave, timeout=delay)

    # Serving

    async def _serve(self, deployed: Deployed) -> None:
        self._deployed = deployed
        try:
            hooks = load_hooks(self._settings.hooks, ReplicaHook)
        except ConfigurationError as exc:
            self._report("failed", generation=deployed.generation, revision=deployed.spec.revision, error=str(exc))
            return
        await self._client.start()
        self._client.on_control = self._on_control
        set_current_client(self._client)
        self._consumer = Consumer(
            *(self._settings, self._client.signer, self._codec, deployed.spec, self._id),
            hooks=hooks,
            may_go_on=self._is_current,
        )
        self._client.take_other_chunks(self._consumer.take_chunk)
        await self._consumer.connect()
        self._takeover = Takeover(self._settings, self._consumer, self._id)
        self._heartbeat = Heartbeat(
            self._settings,
            self._name,
            self._id,
            entries=lambda: self._consumer.entries,
            on_lost=self._consumer.lost,
            on_tick=self._tick,
            on_beat=self._measure,
        )
        self._heartbeat.start()
        self._takeover.start()
        self._enter(STARTING)
        try:
            if await self._construct(deployed):
                await self._take_calls()
        finally:
            await self._leave()

    async def _construct(self, deployed: Deployed) -> bool:
        spec = deployed.spec
        try:
            # Importing may take long and must not stop the loop.
            target = await enter(asyncio.to_thread, load_target, spec.target, as_main=True)
            self._code = UserCode(spec, target, self._tag, self._codec)
            await self._code.construct()
        except Exception as exc:
            logger.exception("Exception in deployment %r: replica %s could not be constructed", spec.name, self._tag)
            text = str(exc) if isinstance(exc, QServeError) else _traceback_of(exc)
            self._report("failed", generation=deployed.generation, revision=spec.revision, error=text)
            return False
        return True

    async def _take_calls(self) -> None:
        if not self.may_serve.is_set():
            self._enter(STANDBY)
            await self._first_of(self.may_serve, self.shall_leave)
        if self.shall_leave.is_set():
            return
        self._consumer.start(self._code)
        self._takeover.sweep()
        self._heartbeat.serve()
        self._enter(SERVING)
        while not self.shall_leave.is_set():
            await self._first_of(self._changed, self.shall_leave, self.may_leave)
            if self._changed.is_set():
                self._changed.clear()
                await self._follow_change()
            elif self.may_leave.is_set():
                await self._leave_if_idle()

    async def _is_current(self) -> bool:
        """Whether this replica, back from an absence, serves what is deployed, or nobody serves anything newer."""
        deployed = await self._read_state()
        if deployed is None or deployed.spec.revision == self._spec.revision:
            return True
        with _unavailable_if_refused():
            others = (await read_replicas(self._redis, self._keys, self._name)).values()
        if not any(info.state == SERVING and info.revision == deployed.spec.revision for info in others):
            return True
        logger.warning("Deployment %s: replica %s leaves, a newer version serves", self._name, self._tag)
        self.shall_leave.set()
        return False

    async def _leave_if_idle(self) -> None:
        self.may_leave.clear()
        if await self._consumer.finish(_IDLE_WITHIN_S):
            await self._consumer.pause()
            if not self._consumer.entries:  # else a call came before the pause
                self.shall_leave.set()
                return
            self._consumer.start(self._code)
        self._report("busy", running=len(self._consumer.slots))

    async def _follow_change(self) -> None:
        try:
            deployed = await self._read_state()
        except BrokerUnavailable:
            return  # the follower brings a change once Redis is back
        if deployed is None:
            await self._consumer.finish_queue(self._spec.graceful_shutdown_timeout_s)
            self.shall_leave.set()
            return
        if deployed.spec.revision == self._spec.revision and deployed.generation != self._generation:
            await self._apply(deployed)

    async def _apply(self, deployed: Deployed) -> None:
        """Take up a change that needs no new process."""
        config = deployed.spec.user_config
        if config == self._spec.user_config:
            config = None
        elif config is not None and not await self._has_turn(deployed.generation):
            return
        self._deployed = deployed
        self._consumer.slots.spec = deployed.spec
        if config is not None:
            # Calls taken before see the old config, calls taken after the new one; meanwhile they wait in the queue.
            await self._consumer.pause()
            await self._consumer.finish(float("inf"), streams=False)
            try:
                await self._code.reconfigure(config)
            except Exception as exc:
                logger.exception("Exception in deployment %r: reconfigure failed", self._name)
                text = _traceback_of(exc)
                self._report("reconfigure_failed", generation=deployed.generation, error=text)
                return
            finally:
                self._consumer.start(self._code)
        self._publish()
        self._report("applied", generation=deployed.generation)

    async def _has_turn(self, generation: int) -> bool:
        """Serve on until the parent says it is this replica's turn to reconfigure; False if something else comes."""
        self.may_serve.clear()
        self._report("asks_to_apply", generation=generation)
        await self._first_of(self.may_serve, self._changed, self.shall_leave)
        return self.may_serve.is_set() and not self.shall_leave.is_set()

    async def _leave(self) -> None:
        self._enter(DRAINING)
        await self._consumer.pause()
        if hasattr(self, "_code"):
            await self._code.close_websockets()
        with contextlib.suppress(BrokerUnavailable):
            if await self._read_state() is None:  # deleted: what was sent before is answered all the same
                await self._finish_deleted_queue()
        if not await self._consumer.finish(self._spec.graceful_shutdown_timeout_s):
            logger.warning("Deployment %s: %d calls outlived the shutdown", self._name, len(self._consumer.slots))
        await self._takeover.stop()
        all_answered = await self._consumer.stop()
        if hasattr(self, "_code"):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_QUICK_TIMEOUT_S):
                    await self._code.close()
        self._heartbeat.stop()
        await asyncio.to_thread(self._say_goodbye, all_answered)
        set_current_client(None)
        await self._client.stop()

    async def _finish_deleted_queue(self) -> None:
        if hasattr(self, "_code") and self._state == SERVING:
            self._consumer.start(self._code)
            await self._consumer.finish_queue(self._spec.graceful_shutdown_timeout_s)
            await self._consumer.pause()

    def _say_goodbye(self, all_answered: bool) -> None:
        """Leave nothing behind but calls that were never started, for the neighbours to take."""
        reach("leave")
        client = redis_clients.client(self._settings.redis_url, _QUICK_TIMEOUT_S)
        try:
            if not leave(client, self._keys, self._name, self._id, all_answered=all_answered):
                call_neighbours(client, self._keys, self._name, self._id, self._client.signer)
        except (QServeError, CommandRefused) as exc:
            logger.warning("could not say goodbye: %s", exc)
        finally:
            client.close()

    # Telling others

    @property
    def _spec(self) -> Any:
        assert self._deployed is not None
        return self._deployed.spec

    @property
    def _generation(self) -> int:
        assert self._deployed is not None
        return self._deployed.generation

    def _on_control(self, _about: str, control: Control) -> None:
        if control.verb == "cancel":
            self._consumer.withdrawn.withdraw(control.entry.encode(), inherited=control.inherited)
        else:
            self._takeover.sweep()

    def _enter(self, state: str) -> None:
        self._state = state
        self._publish()
        self._report("state", state=state, generation=self._generation, revision=self._spec.revision)
        logger.info("Deployment %s: replica %s (pid %d) is %s", self._name, self._tag, os.getpid(), state)

    def _tick(self) -> None:
        self._consumer.absence.noticed()
        before = self._published
        self._publish()
        after = self._published
        if before is not None and after is not None and before.handled != after.handled:
            self._report("stats", running=after.running, handled=after.handled)

    def _measure(self, client: redis_clients.Client) -> None:
        if not self._birth.scaled and self._spec.autoscaling is None:
            return
        try:
            demand = measure(client, self._keys, self._name)
        except (QServeError, CommandRefused) as exc:  # the number of replicas stays as it is meanwhile
            logger.debug("could not measure the load: %s", exc)
            return
        nodes, node = demand.nodes, self._birth.node
        place = nodes.index(node) if node in nodes else len(nodes)
        facts = {"calls": demand.calls, "waited_s": demand.waited_s, "running": len(self._consumer.slots)}
        self._report("demand", place=place, nodes=max(len(nodes), place + 1), **facts)

    def _publish(self) -> None:
        times = sorted(self._consumer.slots.run_times_ms)
        info = ReplicaInfo(
            id=self._id,
            tag=self._tag,
            worker=self._birth.worker,
            node=self._birth.node,
            host=socket.gethostname(),
            pid=os.getpid(),
            generation=self._generation,
            revision=self._spec.revision,
            state=self._state,
            started_at=self._started_at,
            running=len(self._consumer.slots),
            handled=self._consumer.slots.handled,
            p50_ms=round(times[len(times) // 2], 3) if times else None,
            p99_ms=round(times[len(times) * 99 // 100], 3) if times else None,
        )
        sender, losses = self._consumer.link.sender, self._consumer.link.losses
        if (info != self._published or losses != self._published_at_loss) and sender.is_open:
            self._published, self._published_at_loss = info, losses
            send_replica_report(sender, self._keys, self._name, self._id, info)

    def _report_deployed(self, deployed: Deployed) -> None:
        spec = deployed.spec
        self._report(
            "deployed",
            generation=deployed.generation,
            revision=spec.revision,
            num_replicas=spec.num_replicas,
            surge=spec.surge,
            initialization_timeout=spec.initialization_timeout_s,
            graceful_timeout=spec.graceful_shutdown_timeout_s,
            autoscaling=msgspec.to_builtins(spec.autoscaling),
        )

    def _report(self, event: str, **facts: Any) -> None:
        if "error" in facts:  # a line must fit into one atomic write, however its characters are escaped
            facts["error"] = facts["error"][-_LONGEST_ERROR:]
            while len(json.dumps(facts["error"])) > _LONGEST_ERROR:
                facts["error"] = facts["error"][len(facts["error"]) // 8 + 1 :]
        line = json.dumps({"pid": os.getpid(), "replica": self._id, "event": event, **facts}) + "\n"
        try:
            os.write(self._birth.reports_fd, line.encode())
        except OSError as exc:  # the parent is gone, and this process soon will be
            logger.debug("could not report to the worker: %s", exc)

    @staticmethod
    async def _first_of(*events: asyncio.Event, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Wait until one of the events is set, or the time is over."""
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


def _traceback_of(error: Exception) -> str:
    return "".join(traceback.format_exception(what_was_raised(error)))


@contextlib.contextmanager
def _unavailable_if_refused() -> Iterator[None]:
    """A replica that may not look at the state now goes on as it is, and looks again."""
    try:
        yield
    except (ConfigurationError, CommandRefused) as exc:
        raise BrokerUnavailable(f"Redis refuses to tell: {exc}") from exc
