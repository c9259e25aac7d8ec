"""What applications use: `from qserve import serve`."""

import contextlib
import copyreg
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import msgspec

from qserve.batching import batch
from qserve.calls.durable_ref import DurableRef, attached_ref
from qserve.calls.handle import AsyncDeploymentHandle, DeploymentHandle, DurableHandle, codec_of, unpickle_handle
from qserve.calls.hooked import HookedCall
from qserve.calls.planned_call import plan_call
from qserve.calls.process_client import current_client
from qserve.context import ReplicaContext, get_replica_context
from qserve.deployments import deploying, local_instance
from qserve.deployments.deployment import Deployment, deployment, unpickle_deployment
from qserve.deployments.driver import THIS_PROCESS
from qserve.deployments.http_options import HTTPOptions, Location
from qserve.deployments.ingress import ingress
from qserve.deployments.loading import is_importing
from qserve.durable.cron import parse_when
from qserve.durable.schedules import Declared, Plan, Schedules
from qserve.hooks import ClientHook, HookChain, load_hooks
from qserve.settings import Settings
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

# Pickles, tracebacks and reprs name these by the path that stays, whatever module they stand in.
for _public in (
    *(AsyncDeploymentHandle, Deployment, DeploymentHandle, DurableRef, HTTPOptions, Location, ReplicaContext),
    unpickle_handle,
    unpickle_deployment,
):
    _public.__module__ = __name__

_LOOK_S = 0.2


def start(detached: bool = False, http_options: HTTPOptions | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
    """Start an instance on this machine unless one is running, and return when it serves HTTP.

    If QSERVE_REDIS_URL is set, the instance uses that server; otherwise it starts a server of its own.

    Args:
        detached: Whether the instance outlives this process. Otherwise it ends with it, however the process ends.
        http_options: See `HTTPOptions`. An instance that is running keeps its own, and logs a warning.
        kwargs: Only `dedicated_cpu`, which Ray Serve 1.x has, and without effect; `http_host`, `http_port` and
            `http_middlewares`, which it once had, are refused with a hint.

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
    """Start an instance unless one is running, deploy to it, and return when all that is deployed is served.

    Several deployments start side by side.

    Args:
        target: The deployment or deployments.
        blocking: Whether to stay until Ctrl-C, or until the instance has ended.
        detached, http_options: As for `start`.

    Returns:
        The handle of a single deployment; None for several.

    Raises:
        RuntimeError: A deployment failed; see `Deployment.deploy`.
        ValueError, ConfigurationError: As for `start`.
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
    """The deployment of that name, as it is deployed now: to call it, change it or deploy it again.

    Raises:
        KeyError: There is none of that name.
        NoInstanceError: No instance is running.
    """
    instance = THIS_PROCESS.current()
    deployed = instance.state.get(name)
    if deployed is None:
        raise KeyError(f"Deployment {name} was not found. Did you call Deployment.deploy()?")
    return Deployment.from_spec(deployed.spec, instance.codec)


def get_ref(call_id: str) -> DurableRef[Any]:
    """The ref of a durable call, whichever process has submitted it.

    The result of a call that came over HTTP is a Starlette response. If no call has the id, or none has it any more,
    `result()` of the ref raises CallNotFound.

    Raises:
        ValueError: This is no id of a durable call.
        NoInstanceError: No instance is running.
        BrokerUnavailable: Redis cannot be reached.
    """
    client = current_client()
    return attached_ref(client, codec_of(client), call_id)


copyreg.pickle(DurableRef, lambda ref: (get_ref, (ref.id,)))


def schedule(
    name: str, when: str, target: Deployment[Any] | DeploymentHandle[Any] | DurableHandle, /, *args: Any, **kwargs: Any
) -> None:
    """Make a durable call to a deployment at fixed times; replaces the schedule of that name.

    At the top level of an application it takes effect when the application is deployed (`qserve run`, `qserve
    deploy`). The schedule stays until `unschedule`, even if its deployment is deleted. If no process could make the
    calls that were due, one call is made for all of them later.

    Args:
        name: The name of the schedule.
        when: "0 3 * * *" (minute, hour, day, month, weekday; in UTC, unless a time zone follows), or "every 30s".
        target: The deployment to call. For a method, or with retries and so on: a handle of it, made with
            `options(durable=True, ...)`.
        args, kwargs: The arguments of each call.

    Raises:
        ValueError: The name or the time is not possible.
        ValueNotSerializable, PayloadTooLarge: An argument cannot be sent.
        NoInstanceError: No instance is running.
    """
    handle = target.get_handle() if isinstance(target, Deployment) else target
    plan = plan_call(name, when, handle, args, kwargs)
    hooks = HookChain(load_hooks(Settings().hooks, ClientHook))
    with HookedCall(hooks, plan.deployment, plan.method, "call", durable=True) as hooked:
        _put(plan._replace(meta=hooked.meta))
    hooked.end(None)


def _put(plan: Plan) -> None:
    if is_importing():
        parse_when(plan.when)
        Declared.plans.append(plan)
    else:
        instance = THIS_PROCESS.current()
        Schedules(instance.state).put(plan, instance.codec)


def unschedule(name: str) -> None:
    """Remove a schedule. Calls that it has submitted are not affected.

    Raises:
        KeyError: There is no schedule of that name.
        NoInstanceError: No instance is running.
    """
    if not _ignored("unschedule") and not Schedules(THIS_PROCESS.current().state).remove(name):
        raise KeyError(f"There is no schedule {name!r}; `qserve schedule ls` lists those that exist.")


def list_deployments() -> dict[str, Deployment[Any]]:
    """All deployments by name, as they are deployed now.

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
        error: What went wrong last; "" if nothing did.
        version: The version that is deployed.
        generation: The number of deploys under this name.
        route_prefix: The path under which it is served; None if it is not served over HTTP.
        replicas: Its replicas, as each last described itself.
        queued: The number of calls that wait or run.
        wanted: How many replicas there should be now on all nodes, as far as their workers have reported.
        autoscaling_config: How that number follows the load; None if it is fixed.
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
            replicas=tuple(state.observed.replicas(name).values()),
            queued=state.observed.queued(name),
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
        if name != "dedicated_cpu":
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
