"""The Celery app: which settings make Celery a keeper of replicas, and nothing else."""

from functools import cached_property
from typing import Any

from celery import Celery

from qserve.keys import Keys
from qserve.settings import Settings
from qserve_workers import control  # noqa: F401  registers the commands, for workers and for the command line

QUEUE = "qserve"
"""The one queue that Celery itself consumes; calls travel in streams of their own."""


class App(Celery):  # type: ignore[misc]
    """A Celery app whose workers serve deployments."""

    @cached_property
    def Worker(self) -> Any:  # noqa: N802
        """What `celery worker` starts."""
        return self.subclass_with_self("qserve_workers.worker:Worker")


def make_app(settings: Settings) -> App:
    """The Celery app for one namespace; connects to nothing."""
    app = App("qserve")
    app.conf.update(
        broker_url=settings.redis_url,
        # Without the prefix another Celery app on the same Redis would get our control messages, and we theirs.
        broker_transport_options={"global_keyprefix": Keys(settings.namespace).celery_prefix, "polling_interval": 5},
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        control_exchange=QUEUE,
        event_exchange=f"{QUEUE}.ev",
        task_default_queue=QUEUE,
        accept_content=["json"],
        task_ignore_result=True,
        worker_pool="qserve_workers.pool:ReplicaPool",
        worker_consumer="qserve_workers.worker:Consumer",
        worker_pool_start_method="fork",
        worker_concurrency=1,
        worker_proc_alive_timeout=60,
        worker_prefetch_multiplier=1,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_log_format="%(asctime)s %(levelname)s %(message)s",
        qserve_make_replica="qserve_workers.worker:make_replica",
    )
    app.steps["worker"].add("qserve_workers.worker:Replicas")
    return app


celery = make_app(Settings())
