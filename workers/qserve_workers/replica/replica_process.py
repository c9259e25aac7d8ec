"""The process of a replica: a thread with an event loop, beside the main thread, which waits for signals; and what the
replica does there, from its birth to its end."""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable

from qserve.calls.client import Client
from qserve.calls.process_client import new_event_loop
from qserve.context import set_batch_hooks
from qserve.errors import ConfigurationError
from qserve.hooks import BatchHook, ReplicaHook, load_hooks
from qserve.settings import Settings, at_deployment
from qserve.telemetry.log_records import log_as
from qserve.wire.spec import Deployed
from qserve_workers.replica.birth import Birth, Wishes, first_of
from qserve_workers.replica.deployment_watch import DeploymentWatch
from qserve_workers.replica.replica_events import ConstructionFailed, DeletionSeen, DeploymentSeen, EventWriter
from qserve_workers.replica.service import Service
from qserve_workers.user.user_output import show_output

logger = logging.getLogger(__name__)

_LEAST_GRACE_S = 1.0
"""What exit hooks get where calls have used up the grace time; the worker waits a little longer than that."""

_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.1, 10.0


class ReplicaProcess:
    """The replica of this process, on a thread with an event loop of its own."""

    def __init__(self, birth: Birth, settings: Settings) -> None:
        self._birth = birth
        self._settings = settings
        self._drained = threading.Event()
        # No daemon: threads that user code starts would inherit that, and be cut off at the end.
        self._thread = threading.Thread(target=self._run, name="qserve-replica")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wishes = Wishes()
        self._ready = threading.Event()
        self._end_by = 0.0

    def start(self, hear: Callable[[], None] = lambda: None) -> None:
        """Start the replica's thread and return at once.

        Args:
            hear: Returns once the main thread has acted on the signals that came before; see `Wishes`.
        """
        self._wishes = Wishes(hear=hear)
        name = self._birth.deployment if self._settings.names_output else None
        show_output(name, names_records=self._settings.log_format == "text")  # a name would break a line of JSON
        self._thread.start()

    def serve(self) -> None:
        """Let a standby replica take calls, or one that asked for its turn reconfigure. From any thread."""
        self._tell(self._wishes.may_serve)

    def release(self) -> None:
        """Leave at the next moment without a call in hand; if none comes soon, say so and stay. From any thread."""
        self._tell(self._wishes.may_leave)

    def drain(self) -> None:
        """Finish the calls in hand, hand back the rest, and end. From any thread; again without effect."""
        self._tell(self._wishes.shall_leave)

    def wait_drained(self, timeout: float | None) -> bool:
        """Whether the replica has ended within `timeout` seconds."""
        return self._drained.wait(timeout)

    def grace_left_s(self) -> float:
        """How long the process of a replica that has ended may still take to end."""
        return max(_LEAST_GRACE_S, self._end_by - time.monotonic())

    def _tell(self, wish: asyncio.Event) -> None:
        self._ready.wait()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: there is nothing left to tell
                self._loop.call_soon_threadsafe(wish.set)

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
        self._ready.set()
        self._end_by = await Replica(self._birth, self._settings, self._wishes).live()


def pause_after(failures: int) -> float:
    """How many seconds to wait after so many failed constructors, of which there are thousands where what they need is
    away for long."""
    return min(_FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 60), _LONGEST_BACKOFF_S)


class Replica:
    """The life of a replica: wait for a deployment, construct and serve it, leave."""

    def __init__(self, birth: Birth, settings: Settings, wishes: Wishes) -> None:
        self._birth = birth
        self._settings = settings = at_deployment(settings, birth.deployment)
        self._wishes = wishes
        self._client = Client(settings)
        self._events = EventWriter(birth.reports_fd, self._client.id)
        self._watch = DeploymentWatch(settings, birth.deployment, self._client.signer, self._seen)
        if not birth.standby:
            wishes.may_serve.set()

    async def live(self) -> float:
        """From birth to the end.

        Returns:
            When the process is to have ended, on `time.monotonic`.
        """
        await self._watch.start()
        try:
            deployed = await self._watch.until_deployed(self._wishes.shall_leave)
            if deployed is None:
                return 0.0
            await self._backoff()
            if self._wishes.shall_leave.is_set():
                return 0.0
            return await self._serve(await self._watch.read() or deployed)
        finally:
            await self._watch.stop()

    async def _backoff(self) -> None:
        """Wait before another try after failed constructors; a new deploy is tried at once."""
        if self._birth.failures:
            pause_s = pause_after(self._birth.failures)
            await first_of(self._watch.changed, self._wishes.shall_leave, timeout=pause_s)

    async def _serve(self, deployed: Deployed) -> float:
        try:
            hooks = load_hooks(self._settings.hook_paths, ReplicaHook)
            set_batch_hooks(load_hooks(self._settings.hook_paths, BatchHook))
        except ConfigurationError as exc:
            generation, revision = deployed.generation, deployed.spec.revision
            self._events.tell(ConstructionFailed(generation=generation, revision=revision, error=str(exc)))
            return 0.0
        tag = f"{self._birth.deployment}#{secrets.token_hex(4)}"
        log_as("replica", self._birth.deployment, tag)
        return await Service(
            self._birth,
            tag,
            self._settings,
            deployed,
            client=self._client,
            watch=self._watch,
            wishes=self._wishes,
            events=self._events,
            hooks=hooks,
        ).run()

    def _seen(self, deployed: Deployed | None) -> None:
        if deployed is None:
            self._events.tell(DeletionSeen())
            return
        spec = deployed.spec
        self._events.tell(
            DeploymentSeen(
                generation=deployed.generation,
                revision=spec.revision,
                num_replicas=spec.num_replicas,
                surge=spec.surge and not spec.num_gpus,  # the new one would wait for the GPU of the old one
                initialization_timeout=spec.initialization_timeout_s,
                graceful_timeout=spec.graceful_shutdown_timeout_s,
                autoscaling=spec.autoscaling,
                most_failures=spec.max_constructor_retry_count,
            )
        )
