"""The Celery app: what makes Celery a keeper of replicas and nothing else."""

import logging
from functools import cached_property
from typing import Any
from urllib.parse import quote

import click
from celery import Celery, signals

from qserve.broker.server.address import Broker, host_and_port, parse
from qserve.deployments.local_instance import NO_INSTANCE, find_settings
from qserve.errors import ConfigurationError, NoInstanceError
from qserve.settings import Settings
from qserve.telemetry.log_records import formatter, log_as
from qserve_workers.celery_calls.celery_queue import QUEUE
from qserve_workers.celery_calls.cluster_transport import TRANSPORT, URL_OPTION
from qserve_workers.pool import control  # noqa: F401  registers the commands, for workers and for the command line
from qserve_workers.titles import set_title

_CONNECT_TIMEOUT_S = 1.0
_SELDOM_S = 300.0
"""How often kombu looks for tasks that were not acknowledged, of which there are none, and for new passwords."""


class App(Celery):  # type: ignore[misc]
    """A Celery app whose workers serve the deployments of one instance.

    Args:
        settings: Where the instance is; without a `redis_url` that can be used every attempt to connect says so.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__("qserve")
        self.steps["worker"].add("qserve_workers.pool.celery_worker:KeeperStep")
        self.steps["consumer"].add("qserve_workers.pool.celery_worker:CeleryCallsStep")
        self.conf.update(
            broker_connection_retry_on_startup=True,
            broker_connection_max_retries=None,
            control_exchange=QUEUE,
            event_exchange=f"{QUEUE}.ev",
            task_default_queue=QUEUE,
            accept_content=["json"],
            task_ignore_result=True,
            beat_scheduler="qserve_workers.beat:Scheduler",
            worker_pool="qserve_workers.pool.prefork:ReplicaPool",
            worker_autoscaler="qserve_workers.pool.autoscaler:Autoscaler",
            worker_consumer="qserve_workers.pool.celery_worker:PatientConsumer",
            worker_pool_start_method="fork",
            worker_concurrency=1,
            worker_proc_alive_timeout=60,
            worker_prefetch_multiplier=1,
            worker_send_task_events=False,
            # Says what Celery would warn about at every reconnect; there are no tasks to cancel.
            worker_cancel_long_running_tasks_on_connection_loss=True,
            worker_hijack_root_logger=False,
            worker_redirect_stdouts=False,
            qserve_replica="qserve_workers.replica.replica_process:ReplicaProcess",
        )
        self.use(settings)

    def use(self, settings: Settings) -> None:
        """Serve the deployments of this instance, before anything was sent."""
        self.settings = settings
        broker, self._problem = _reachable(settings)
        self.conf.update(**broker)

    @cached_property
    def Worker(self) -> Any:  # noqa: N802
        """What `celery worker` starts."""
        return self.subclass_with_self("qserve_workers.pool.celery_worker:DeploymentWorker")

    def connection_for_read(self, *args: Any, **kwargs: Any) -> Any:
        """A connection to the broker, which is the instance's Redis."""
        self._check_instance()
        return super().connection_for_read(*args, **kwargs)

    def connection_for_write(self, *args: Any, **kwargs: Any) -> Any:
        """A connection to the broker, which is the instance's Redis."""
        self._check_instance()
        return super().connection_for_write(*args, **kwargs)

    def _check_instance(self) -> None:
        if self._problem:  # else Celery would look for RabbitMQ
            raise click.UsageError(self._problem)


def _reachable(settings: Settings) -> tuple[dict[str, Any], str]:
    """Celery's settings for the broker, or why there are none; an import must not fail for want of an instance."""
    if not settings.redis_url:
        return {}, NO_INSTANCE
    try:
        found = broker_settings(settings.keys.address(settings.redis_url))
    except ConfigurationError as exc:
        return {}, str(exc)
    # Without a prefix another Celery app on the same Redis would get our control messages, and we theirs.
    found["broker_transport_options"]["global_keyprefix"] = settings.keys.celery_prefix
    return found, ""


def broker_settings(url: str) -> dict[str, Any]:
    """A Redis URL as Celery's settings, which have another spelling for nearly everything."""
    broker = parse(url)
    login = quote(broker.username, safe="") + (f":{quote(broker.password, safe='')}" if broker.password else "")
    login += "@" if login else ""
    options: dict[str, Any] = {
        "socket_connect_timeout": _CONNECT_TIMEOUT_S,
        "unacked_restore_interval": _SELDOM_S,
        "reauth_check_interval": _SELDOM_S,
    }
    transport = None
    if broker.path:
        location = f"redis+socket://{login}{quote(broker.path)}?virtual_host={broker.db}"
    elif broker.sentinels:
        location = ";".join(f"sentinel://{login}{host_and_port(each)}/{broker.db}" for each in broker.sentinels)
        options |= {"master_name": broker.service, "sentinel_kwargs": _sentinel_options(broker)}
    elif broker.nodes:
        location, transport = f"redis://{login}{host_and_port(broker.nodes[0])}/0", TRANSPORT
        options |= {URL_OPTION: url}
    else:
        location = f"redis://{login}{host_and_port((broker.host, broker.port))}/{broker.db}"
    return {
        "broker_url": location,
        "broker_transport_options": options,
        "broker_use_ssl": broker.tls.options if broker.tls else None,
        "broker_transport": transport,
    }


def _sentinel_options(broker: Broker) -> dict[str, Any]:
    options: dict[str, Any] = {
        "username": broker.sentinel_username or None,
        "password": broker.sentinel_password or None,
        "socket_timeout": _CONNECT_TIMEOUT_S,
        "socket_connect_timeout": _CONNECT_TIMEOUT_S,
    }
    return options | ({"ssl": True} | broker.tls.options if broker.tls else {})


def settings_found() -> Settings:
    """The settings of this process; an instance on this machine is found without them."""
    try:
        return find_settings()
    except NoInstanceError:
        return Settings()


celery = App(settings_found())


@signals.beat_init.connect  # type: ignore[untyped-decorator]
def _log_as_beat(**_facts: Any) -> None:
    log_as("beat")
    set_title("qserve: beat")


@signals.after_setup_logger.connect  # type: ignore[untyped-decorator]
def _log_as_others_do(logger: logging.Logger, **_facts: Any) -> None:
    for handler in logger.handlers:
        handler.setFormatter(formatter(celery.settings.log_format))
