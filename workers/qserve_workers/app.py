"""The Celery app: what makes Celery a keeper of replicas and nothing else."""

from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import click
from celery import Celery

from qserve.errors import NoInstanceError
from qserve.local import NO_INSTANCE, find_settings
from qserve.settings import Settings
from qserve_workers import control  # noqa: F401  registers the commands, for workers and for the command line

QUEUE = "qserve"
"""The one queue that Celery itself consumes; calls travel in streams of their own."""


class App(Celery):  # type: ignore[misc]
    """A Celery app whose workers serve the deployments of one instance.

    Args:
        settings: Where the instance is; without `redis_url` every attempt to connect says that there is none.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__("qserve")
        self.settings = settings
        self.steps["worker"].add("qserve_workers.worker:Replicas")
        self.conf.update(
            broker_url=celery_url(settings.redis_url) if settings.redis_url else None,
            # Without a prefix another Celery app on the same Redis would get our control messages, and we theirs.
            broker_transport_options={"global_keyprefix": settings.keys.celery_prefix},
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
            # Says what Celery would warn about at every reconnect; there are no tasks to cancel.
            worker_cancel_long_running_tasks_on_connection_loss=True,
            worker_hijack_root_logger=False,
            worker_redirect_stdouts=False,
            worker_log_format="%(asctime)s %(levelname)s %(message)s",
            qserve_replica="qserve_workers.replica:ReplicaProcess",
        )

    @cached_property
    def Worker(self) -> Any:  # noqa: N802
        """What `celery worker` starts."""
        return self.subclass_with_self("qserve_workers.worker:Worker")

    def connection_for_read(self, *args: Any, **kwargs: Any) -> Any:
        """A connection to the broker, which is the instance's Redis."""
        self._check_instance()
        return super().connection_for_read(*args, **kwargs)

    def connection_for_write(self, *args: Any, **kwargs: Any) -> Any:
        """A connection to the broker, which is the instance's Redis."""
        self._check_instance()
        return super().connection_for_write(*args, **kwargs)

    def _check_instance(self) -> None:
        if not self.settings.redis_url:  # else Celery would look for RabbitMQ
            raise click.UsageError(NO_INSTANCE)


def celery_url(url: str) -> str:
    """A Redis URL in Celery's spelling, which differs for sockets and is careless about certificates."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    if parts.scheme == "unix":
        query["virtual_host"] = query.pop("db", "0")
        # Not urlunsplit, which leaves out the "//" before an empty host.
        return f"redis+socket://{parts.netloc}{parts.path}?{urlencode(query)}"
    if parts.scheme == "rediss":
        query.setdefault("ssl_cert_reqs", "required")
    if "db" in query:
        parts = parts._replace(path=f"/{query.pop('db')}")
    return urlunsplit(parts._replace(query=urlencode(query)))


def _settings() -> Settings:
    try:
        return find_settings()
    except NoInstanceError:
        return Settings()


celery = App(_settings())
