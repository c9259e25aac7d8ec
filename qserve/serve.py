"""The public verbs: `from qserve import serve`."""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import msgspec

from qserve.batching import batch
from qserve.calls.durable_ref import DurableRef
from qserve.calls.handle import AsyncDeploymentHandle, DeploymentHandle, DurableHandle, plan_call, ref_of
from qserve.context import ReplicaContext, get_replica_context
from qserve.deployments import deploying, local_instance
from qserve.deployments.deployment import Deployment, deployment
from qserve.deployments.driver import THIS_PROCESS
from qserve.deployments.http_options import HTTPOptions, Location
from qserve.deployments.ingress import ingress
from qserve.deployments.loading import is_importing
from qserve.durable.cron import parse_when
from qserve.durable.schedules import Declared, Schedules
from qserve.wire.codec import Codec
from qserve.wire.spec import ReplicaInfo

__all__ = [
    "AsyncDeploymentHandle",
    "Deployment",
    "DeploymentHandle",
    "DeploymentStatus",
    "DurableRef",
    "HTTPOptions",
    "Location",
    "ReplicaContext",
    "batch",
    "deployment",
    "get_deployment",
    "get_ref",
    "get_replica_context",
    "ingress",
    "list_deployments",
    "run",
    "schedule",
    "shutdown",
    "start",
    "status",
    "unschedule",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LOOK_S = 0.2


def start(detached: bool = False, http_options: HTTPOptions | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
    """Start an instance on this machine unless one runs; returns when it serves HTTP.

    With QSERVE_REDIS_URL set it is that server's instance, else one with a server of its own.

    Args:
        detached: It outlives this process; else it ends with it, however that ends.
        http_options: See `HTTPOptions`. A running instance keeps its own, with a warning.
        kwargs: None are known; the old `http_host`, `http_port` and `http_middlewares` get a hint.

    Raises:
        ValueError: The address cannot be listened on.
        ConfigurationError: The instance cannot be started; the text says why.
    """
    _refuse_old_options(kwargs)
    options = _options(http_options)
    if not _ignored("start"):
        THIS_PROCESS.start(options, detached=detached)


@overload
def run(
    target: Deployment[T],
    *,
    blocking: bool = False,
    detached: bool = False,
    http_options: HTTPOptions | Mapping[str, Any] | None = None,
) -> DeploymentHandle[T]: ...
@overload
def run(
    target: Sequence[Deployment[Any]] | None = None,
    *,
    blocking: bool = False,
    detached: bool = False,
    http_options: HTTPOptions | Mapping[str, Any] | None = None,
) -> None: ...
def run(
    target: Deployment[Any] | Sequence[Deployment[Any]] | None = None,
    *,
    blocking: bool = False,
    detached: bool = False,
    http_options: HTTPOptions | Mapping[str, Any] | None = None,
) -> DeploymentHandle[Any] | None:
    """Start an instance unless one runs, and deploy to it; several deployments come up side by side.

    Args:
        target: What to deploy.
        blocking: Stay until Ctrl-C.
        detached, http_options: As for `start`.

    Returns:
        The handle of a single target.

    Raises:
        RuntimeError: A deployment failed; see `Deployment.deploy`.
    """
    options = _options(http_options)
    one = target if isinstance(target, Deployment) else None
    if not _ignored("run"):
        several = [one] if one is not None else list(target or ())  # type: ignore[arg-type]
        instance = THIS_PROCESS.start(options, detached=detached, wait=False)
        goals = [instance.put(each.to_spec(instance.codec)) for each in several]
        for goal in goals:
            goal.wait()
        THIS_PROCESS.wait_until_ready()
        if blocking:
            _stay(instance.settings.namespace)
    return one.get_handle() if one is not None else None


def shutdown() -> None:
    """Delete all deployments and stop the processes of the instance; harmless where there is none."""
    if not _ignored("shutdown"):
        THIS_PROCESS.shutdown()


def get_deployment(name: str) -> Deployment[Any]:
    """The deployment of that name, to call, change or deploy again.

    Raises:
        KeyError: There is none.
        NoInstanceError: No instance is running.
    """
    instance = THIS_PROCESS.current()
    deployed = instance.state.get(name)
    if deployed is None:
        raise KeyError(f"Deployment {name} was not found. Did you call Deployment.deploy()?")
    return Deployment.from_spec(deployed.spec, instance.codec)


def get_ref(call_id: str) -> DurableRef[Any]:
    """The ref of a durable call, whoever submitted it; the result of one sent over HTTP is a Starlette response.

    An id that nobody knows (any more) is told by the ref: its `result()` raises CallNotFound.

    Raises:
        ValueError: This is no id of a durable call.
        NoInstanceError, BrokerUnavailable: There is no qserve instance to ask.
    """
    return ref_of(call_id)


def schedule(
    name: str, when: str, target: Deployment[Any] | DeploymentHandle[Any] | DurableHandle, /, *args: Any, **kwargs: Any
) -> None:
    """Call a deployment whenever it is due, with a durable call each time; replaces the schedule of that name.

    At the top level of an application it takes effect when that is deployed (`qserve run`, `qserve deploy`). It stays
    until `unschedule`, also if its deployment goes; moments that nobody was there for are made up for by one call.

    Args:
        name: Of the schedule.
        when: "0 3 * * *" (minute, hour, day, month, weekday; UTC, unless a time zone follows), or "every 30s".
        target: What to call; for a method, retries and so on: its handle, made with `options(durable=True, ...)`.
        args, kwargs: Its arguments.

    Raises:
        ValueError: The name or the time cannot be.
        ValueNotSerializable, PayloadTooLarge: An argument cannot travel.
        NoInstanceError: No instance is running.
    """
    handle = target.get_handle() if isinstance(target, Deployment) else target
    plan = plan_call(name, when, handle, args, kwargs)
    if is_importing():
        parse_when(when)
        Declared.plans.append(plan)
        return
    instance = THIS_PROCESS.current()
    settings = instance.settings
    codec = Codec(allow_pickle=bool(settings.secrets), max_bytes=settings.max_value_bytes)
    Schedules(instance.state).put(plan, codec)


def unschedule(name: str) -> None:
    """Forget a schedule; calls that it has submitted go on.

    Raises:
        KeyError: There is none of that name.
        NoInstanceError: No instance is running.
    """
    if not _ignored("unschedule") and not Schedules(THIS_PROCESS.current().state).remove(name):
        raise KeyError(f"there is no schedule {name!r}")


def list_deployments() -> dict[str, Deployment[Any]]:
    """Every deployment by name.

    Raises:
        NoInstanceError: No instance is running.
    """
    instance = THIS_PROCESS.current()
    return {
        name: Deployment.from_spec(deployed.spec, instance.codec) for name, deployed in instance.state.list().items()
    }


@dataclass(frozen=True)
class DeploymentStatus:
    """How a deployment is doing.

    Attributes:
        state: WAITING (no node is alive), DEPLOYING, HEALTHY or DEPLOY_FAILED.
        error: What went wrong last, "" if nothing did.
        version: As deployed.
        generation: Counts the deploys of this name.
        route_prefix: None when it is not served over HTTP.
        replicas: One for each process, as it last described itself.
        queued: Calls that wait or run.
        wanted: How many replicas there are to be now, over all nodes, as far as their workers have told.
        autoscaling_config: Between which bounds, and how, that follows the load; None: it does not.
    """

    state: str
    error: str
    version: str | None
    generation: int
    route_prefix: str | None
    replicas: tuple[ReplicaInfo, ...]
    queued: int
    wanted: int
    autoscaling_config: dict[str, Any] | None


def status() -> dict[str, DeploymentStatus]:
    """How every deployment is doing.

    Raises:
        NoInstanceError: No instance is running.
    """
    state = THIS_PROCESS.current().state
    return {
        name: DeploymentStatus(
            state=deployed.state,
            error=deployed.error,
            version=deployed.spec.version,
            generation=deployed.generation,
            route_prefix=deployed.spec.route_prefix,
            replicas=tuple(state.replicas(name).values()),
            queued=state.queued(name),
            wanted=deploying.wanted(state, name),
            autoscaling_config=None if scaling is None else msgspec.structs.asdict(scaling),
        )
        for name, deployed in state.list().items()
        for scaling in [deployed.spec.autoscaling]
    }


def _options(given: HTTPOptions | Mapping[str, Any] | None) -> HTTPOptions:
    return given if isinstance(given, HTTPOptions) else HTTPOptions(**(given or {}))


def _refuse_old_options(kwargs: Mapping[str, Any]) -> None:
    for name in kwargs:
        if name in {"http_host", "http_port", "http_middlewares"}:
            option = name.removeprefix("http_")
            raise ValueError(f"{name} is not an option any more. Use http_options={{'{option}': ...}} instead.")
        raise TypeError(f"start() got an unexpected keyword argument '{name}'")


def _ignored(verb: str) -> bool:
    if is_importing():
        logger.debug("Importing is not deploying: serve.%s() does nothing.", verb)
        return True
    return False


def _stay(namespace: str) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        while local_instance.find_record(namespace) is not None:
            time.sleep(_LOOK_S)
