"""Celery's worker and consumer, told that `-Q` names a deployment and `--concurrency` counts its replicas."""

import logging
import os
import pkgutil
import warnings
from typing import Any

import click
from celery import bootsteps
from celery.apps import worker as celery_worker
from celery.exceptions import SecurityWarning
from celery.worker import autoscale, components, consumer
from celery.worker.consumer.tasks import Tasks
from celery.worker.state import maybe_shutdown

from qserve.broker.server.address import parse
from qserve.telemetry.log_records import log_as
from qserve.wire.names import is_name
from qserve_workers.celery_calls.celery_queue import QUEUE, CeleryQueue
from qserve_workers.pool.keeper import Keeper
from qserve_workers.pool.prefork import ReplicaPool
from qserve_workers.titles import set_title

logger = logging.getLogger(__name__)


class DeploymentWorker(celery_worker.Worker):  # type: ignore[misc]
    """A Celery worker that serves one deployment."""

    def __init__(self, app: Any = None, hostname: str | None = None, **options: Any) -> None:
        self.deployment = _one_deployment(options.get("queues"))
        log_as("worker", self.deployment)
        self.bounds = _bounds(options.get("autoscale"))
        concurrency = options.get("concurrency") or self.app.conf.worker_concurrency
        options["autoscale"] = self.bounds[::-1] if self.bounds else (concurrency, concurrency)
        if _is_default("loglevel"):
            options["loglevel"] = self.app.settings.log_level.upper()
        if hostname is None or _is_default("hostname"):  # else two workers on one host would share a name
            hostname = f"{self.deployment}-{os.getpid()}@{os.uname().nodename}"
        chatty = bool(options.get("task_events"))
        options.update(without_gossip=True, without_mingle=True, without_heartbeat=not chatty)
        super().__init__(app=app, hostname=hostname, **options)

    def on_before_init(self, **options: Any) -> None:
        """Keep Celery's nine lines about running as root for one of our own."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SecurityWarning)
            super().on_before_init(**options)

    def setup_queues(self, include: Any, exclude: Any = None) -> None:
        """Let Celery read no queue, whatever -Q says; `CeleryCallsStep` reads what Celery clients send."""
        super().setup_queues([QUEUE], [QUEUE])

    def on_init_blueprint(self) -> None:
        """Refuse pools whose children are not processes."""
        super().on_init_blueprint()
        if not issubclass(self.pool_cls, ReplicaPool):
            raise click.UsageError("Replicas are processes of the prefork pool; leave out --pool.")

    def set_process_status(self, _info: Any) -> None:
        """Let `ps` show the deployment instead of Celery's words."""
        set_title(f"qserve: worker of {self.deployment}")

    def install_platform_tweaks(self, worker: Any) -> None:
        """Let SIGTERM do what it does without a line that is no record of the log."""
        super().install_platform_tweaks(worker)
        celery_worker.install_worker_term_handler(worker, verbose=False)

    def emit_banner(self) -> None:
        """One line instead of Celery's banner."""
        logger.info(
            "Worker %s: deployment %s, %d replica(s), Redis %s",
            *(self.hostname, self.deployment, self.min_concurrency, parse(self.app.settings.redis_url).place),
        )
        if os.geteuid() == 0 and "QSERVE_NODE" not in os.environ:  # else the node has said so, once for all workers
            logger.warning("This worker runs as root, and so does the code of the deployment")


class PatientConsumer(consumer.Consumer):  # type: ignore[misc]
    """Celery's consumer, which looks after the replicas also while the broker is away."""

    def ensure_connected(self, conn: Any) -> Any:
        """Connect, however long it takes, with short pauses."""

        def on_error(exc: Exception, interval: float) -> None:
            if interval:  # else another sentinel is asked at once
                place = parse(self.app.settings.redis_url).place
                logger.error("Cannot reach Redis at %s: %s. Next try in %g s.", place, str(exc).rstrip("."), interval)

        def meanwhile() -> None:
            maybe_shutdown()
            self.pool.maintain_pool()
            self.pool.keeper.on_readable()  # a full pipe would stop the replicas
            self.pool.keeper.say_alive()

        conn.ensure_connection(
            on_error, None, interval_start=0.1, interval_step=0.4, interval_max=2.0, callback=meanwhile
        )
        self.first_connection_attempt = False
        return conn

    def connect(self) -> Any:
        """The connection on which control commands come."""
        conn = super().connect()
        # kombu 5.7 wakes every second for queues that expire, of which a worker of ours reads none.
        expiry = getattr(getattr(conn.transport, "cycle", None), "_binding_expiry_tref", None)
        if expiry is not None:
            expiry.cancel()
        return conn


class KeeperStep(bootsteps.Step):  # type: ignore[misc]
    """Gives the pool its keeper, before the first child is forked."""

    requires = (components.Pool, autoscale.WorkerComponent)

    def include(self, parent: DeploymentWorker) -> None:
        """Called once, when all steps have been created and none has started."""
        parent.pool.hub = parent.hub
        parent.pool.keeper = Keeper(
            parent.deployment,
            parent.min_concurrency,
            parent.app.settings,
            pkgutil.resolve_name(parent.app.conf.qserve_replica),
            resize=parent.pool.resize,
            call_later=parent.pool.call_later,
            node=os.environ.get("QSERVE_NODE", ""),
            exact=os.environ.get("QSERVE_REPLICAS_EXACT") == "1",
            bounds=parent.bounds,
        )
        parent.pool.keeper.on_demand = parent.autoscaler.maybe_scale


class CeleryCallsStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Reads what Celery clients send, while the consumer is connected."""

    requires = (Tasks,)

    def __init__(self, parent: PatientConsumer, **_options: Any) -> None:
        self._settings = parent.app.settings
        self._queue: CeleryQueue | None = None
        super().__init__(parent)

    def include_if(self, parent: PatientConsumer) -> bool:
        """On a cluster Celery clients cannot be answered: their transport for Redis knows no clusters."""
        is_cluster = self._settings.keys.shards > 1
        if is_cluster and self._settings.celery_calls:
            logger.warning("Calls from Celery clients are not possible where Redis is a cluster")
        return not is_cluster and bool(super().include_if(parent))

    def start(self, parent: PatientConsumer) -> None:
        """Called after every connection to the broker."""
        self._queue = CeleryQueue(self._settings)
        self._queue.start(parent.hub)

    def stop(self, _parent: PatientConsumer) -> None:
        """Called when the connection is lost, and at the end."""
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.stop()


def _one_deployment(queues: Any) -> str:
    names = [queues] if isinstance(queues, str) else list(queues or ())
    if len(names) == 1 and is_name(names[0]):
        return str(names[0])
    if len(names) == 1:
        raise click.UsageError(f"{names[0]!r} is not a deployment name: 1 to 63 of the characters A-Z a-z 0-9 _ . -")
    found = f"-Q names {len(names)}: {', '.join(names)}" if names else "-Q names none"
    raise click.UsageError(
        f"A worker serves one deployment, and {found}. Give one, as in `celery -A qserve_workers worker -Q Echo "
        "--concurrency 2`, or run `qserve start`, which keeps a worker for every deployment."
    )


def _bounds(option: Any) -> tuple[int, int] | None:
    """(fewest, most) replicas from `--autoscale MAX,MIN`."""
    if not option:
        return None
    most, fewest = option
    if most < 1:
        raise click.UsageError(f"--autoscale {most}: give the most replicas, and the fewest, as in --autoscale 4,1.")
    return max(1, fewest), most  # `--autoscale 4` arrives as 4,0


def _is_default(option: str) -> bool:
    context = click.get_current_context(silent=True)
    source = context.get_parameter_source(option) if context is not None else None
    return source is click.core.ParameterSource.DEFAULT
