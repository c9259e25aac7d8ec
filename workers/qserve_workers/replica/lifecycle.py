"""One replica of one deployment, from its birth to its end."""

import secrets

from qserve.calls.client import Client
from qserve.context import set_batch_hooks
from qserve.errors import ConfigurationError
from qserve.hooks import BatchHook, ReplicaHook, load_hooks
from qserve.settings import Settings
from qserve.telemetry.log_records import log_as
from qserve.wire.spec import Deployed
from qserve_workers.replica.birth import Birth, Wishes, first_of
from qserve_workers.replica.deployment_watch import DeploymentWatch
from qserve_workers.replica.replica_events import ConstructionFailed, DeletionSeen, DeploymentSeen, EventWriter
from qserve_workers.replica.service import Service

_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.1, 10.0


class Replica:
    """The life of a replica: wait for a deployment, construct and serve it, leave."""

    def __init__(self, birth: Birth, settings: Settings, wishes: Wishes) -> None:
        self._birth = birth
        self._settings = settings
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
            delay = min(_FIRST_BACKOFF_S * 2 ** (self._birth.failures - 1), _LONGEST_BACKOFF_S)
            await first_of(self._watch.changed, self._wishes.shall_leave, timeout=delay)

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
                surge=spec.surge,
                initialization_timeout=spec.initialization_timeout_s,
                graceful_timeout=spec.graceful_shutdown_timeout_s,
                autoscaling=spec.autoscaling,
            )
        )
