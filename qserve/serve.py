"""What applications use: `from qserve import serve`."""

import asyncio
import copyreg
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from qserve.applications.application_goal import JointGoal, delete_all, deployments_of
from qserve.applications.application_handles import get_app_handle, get_deployment_handle
from qserve.applications.graph import DEFAULT_NAME, RunTarget, make_graph
from qserve.applications.serve_status import ApplicationStatus, DeploymentStatus, ServeStatus, serve_status
from qserve.batching import batch
from qserve.calls.durable_ref import DurableRef, attached_ref
from qserve.calls.handle import AsyncDeploymentHandle, DeploymentHandle
from qserve.calls.handles.base_handle import unpickle_handle
from qserve.calls.handles.durable_handle import DurableHandle
from qserve.calls.handles.handle_codec import codec_of
from qserve.calls.handles.hooked import HookedCall
from qserve.calls.planned_call import plan_call
from qserve.calls.process_client import current_client
from qserve.calls.ref import Ref
from qserve.calls.streams import ResultStream
from qserve.config_file.logging_config import LoggingConfig
from qserve.context import ReplicaContext, ReplicaRank, get_replica_context
from qserve.deployments.binding import Application
from qserve.deployments.deployment import Deployment, deployment, unpickle_deployment
from qserve.deployments.driver import THIS_PROCESS
from qserve.deployments.http_options import HTTPOptions, Location, ProxyLocation
from qserve.deployments.ingress import ingress
from qserve.deployments.loading import is_at_top_level, is_importing
from qserve.deployments.option_errors import told_in_words
from qserve.durable.cron import parse_when
from qserve.durable.schedules import Declared
from qserve.errors import (
    BackPressureError,
    CallCancelled,
    DeploymentUnavailable,
    QServeError,
    ReplicaDied,
)
from qserve.hooks import ClientHook, HookChain, load_hooks
from qserve.multiplexing import get_multiplexed_model_id, multiplexed
from qserve.screen.replica_output import before_start, show_output
from qserve.screen.script import serve_in_foreground
from qserve.settings import Settings
from qserve.telemetry import user_metrics as metrics
from qserve.telemetry.user_metrics import Counter, Gauge, Histogram
from qserve.wire.autoscaling import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from qserve.wire.options import Default
from qserve.wire.ray_names import MODULES_OF_SERVE, refuse_missing, warn_of

__all__ = [
    "Application",
    "ApplicationStatus",
    "ApplicationStatusOverview",
    "AsyncDeploymentHandle",
    "AutoscalingConfig",
    "AutoscalingContext",
    "AutoscalingPolicy",
    "BackPressureError",
    "Counter",
    "Deployment",
    "DeploymentHandle",
    "DeploymentResponse",
    "DeploymentResponseGenerator",
    "DeploymentStatus",
    "DeploymentUnavailableError",
    "DurableRef",
    "Gauge",
    "HTTPOptions",
    "Histogram",
    "Location",
    "LoggingConfig",
    "ProxyLocation",
    "RayServeException",
    "ReplicaContext",
    "ReplicaRank",
    "ReplicaUnavailableError",
    "RequestCancelledError",
    "RunTarget",
    "ServeStatus",
    "batch",
    "delete",
    "deployment",
    "get_app_handle",
    "get_deployment",
    "get_deployment_handle",
    "get_multiplexed_model_id",
    "get_ref",
    "get_replica_context",
    "ingress",
    "list_deployments",
    "metrics",
    "multiplexed",
    "run",
    "run_many",
    "schedule",
    "shutdown",
    "shutdown_async",
    "start",
    "status",
    "unschedule",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Names of Ray Serve 2.x for what is called otherwise here.
ApplicationStatusOverview = ApplicationStatus
DeploymentResponse = Ref
DeploymentResponseGenerator = ResultStream
RayServeException = QServeError
RequestCancelledError = CallCancelled
DeploymentUnavailableError = DeploymentUnavailable
ReplicaUnavailableError = ReplicaDied

# Pickles, tracebacks and reprs name these by the path that stays, whatever module they stand in.
for _public in (
    *(Application, ApplicationStatus, DeploymentStatus, RunTarget, ServeStatus, get_app_handle, get_deployment_handle),
    *(AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, HTTPOptions, Location, LoggingConfig, ProxyLocation),
    *(AsyncDeploymentHandle, Deployment, DeploymentHandle, DurableRef, ReplicaContext, ReplicaRank),
    *(Counter, Gauge, Histogram, unpickle_handle, unpickle_deployment),
):
    _public.__module__ = __name__

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in MODULES_OF_SERVE:
            return sys.modules[__name__]
        refuse_missing(name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def start(
    detached: bool = False,
    http_options: HTTPOptions | Mapping[str, Any] | None = None,
    *,
    proxy_location: str | None = None,
    **kwargs: Any,
) -> None:
    """Start an instance on this machine unless one is running, and return when it serves HTTP.

    If QSERVE_REDIS_URL is set, the instance uses that server; otherwise it starts a server of its own.

    Args:
        detached: Whether the instance outlives this process. Otherwise it ends with it, however the process ends.
        http_options: See `HTTPOptions`. An instance that is running keeps its own, and logs a warning.
        proxy_location: `location` of `http_options`, as Ray Serve 2.x has it: "HeadOnly", "EveryNode" or "Disabled".
        kwargs: Only `dedicated_cpu`, `grpc_options` and `logging_config`, which Ray Serve has, and without effect;
            `http_host`, `http_port` and `http_middlewares`, which it once had, are refused with a hint.

    Raises:
        ValueError: The address cannot be listened on.
        ConfigurationError: The instance cannot be started; the text says why.
    """
    _refuse_old_options(kwargs)
    options = _options(http_options)
    if proxy_location is not None:
        options.location = Location("NoServer" if proxy_location == "Disabled" else proxy_location)
    if not _ignored("start"):
        before_start()
        THIS_PROCESS.start(options, detached=detached)
        show_output()


@overload
def run(
    target: Deployment[T] | Application[T],
    *,
    blocking: bool = False,
    detached: bool = False,
    http_options: HTTPOptions | Mapping[str, Any] | None = None,
    name: str = DEFAULT_NAME,
    route_prefix: str | Default | None = Default.VALUE,
    logging_config: object = None,
    _local_testing_mode: bool = False,
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
    target: Application[Any] | Deployment[Any] | Sequence[Deployment[Any]] | None = None,
    *,
    blocking: bool = False,
    detached: bool = False,
    http_options: HTTPOptions | Mapping[str, Any] | None = None,
    name: str = DEFAULT_NAME,
    route_prefix: str | Default | None = Default.VALUE,
    logging_config: object = None,
    _local_testing_mode: bool = False,
) -> DeploymentHandle[Any] | None:
    """Start an instance unless one is running, deploy to it, and return when all that is deployed is served.

    Several deployments start side by side. An application that is deployed again under its name is replaced:
    deployments that it has no more are deleted in the end.

    Args:
        target: An application (`Deployment.bind(...)`), a deployment, or several deployments.
        blocking: Whether to stay until Ctrl-C, or until the instance has ended.
        detached, http_options: As for `start`.
        name: The name of an application. Deployments of another application than "default" are called
            "<application>.<deployment>" in the instance.
        route_prefix: The path of an application; not given: "/", or what its root was given. None: not over HTTP.
        logging_config: Taken because Ray Serve has it, and without effect.
        _local_testing_mode: Whether the deployments run in this process, without HTTP, as `qserve.testing.local` runs
            them, until `shutdown`, or until something is run without this.

    Returns:
        The handle of an application or of a single deployment; None for several deployments.

    Raises:
        RuntimeError: A deployment failed; see `Deployment.deploy`.
        ValueError, ConfigurationError: As for `start`; or the route belongs to somebody else.
    """
    warn_of({"logging_config": logging_config})
    graph = make_graph(target, name, route_prefix) if isinstance(target, Application) else None
    one = target if isinstance(target, Deployment) else None

    several = graph.deployments if graph is not None else _deployments_in(target)
    here = _local_testing_mode
    _bring_up("run", several, blocking=blocking, here=here, detached=detached, http_options=http_options)
    single = graph.root if graph is not None else one
    return single.get_handle() if single is not None else None


def run_many(
    targets: Sequence[RunTarget],
    *,
    blocking: bool = False,
    wait_for_ingress_deployment_creation: bool = True,
    wait_for_applications_running: bool = True,
    _local_testing_mode: bool = False,
) -> list[DeploymentHandle[Any]]:
    """Like `run` for several applications, which start side by side.

    Args:
        wait_for_ingress_deployment_creation: Without effect.
        wait_for_applications_running: Whether to return only when all is served.
    """
    graphs = [make_graph(each.target, each.name, each.route_prefix) for each in targets]

    several = [each for graph in graphs for each in graph.deployments]
    _bring_up("run_many", several, blocking=blocking, here=_local_testing_mode, wait=wait_for_applications_running)
    return [graph.root.get_handle() for graph in graphs]


def _bring_up(
    verb: str,
    deployments: Sequence[Deployment[Any]],
    *,
    blocking: bool,
    here: bool,
    wait: bool = True,
    detached: bool = False,
    http_options: HTTPOptions | Mapping[str, Any] | None = None,
) -> None:
    options = _options(http_options)
    if _ignored(verb):
        return
    if here:
        instance = THIS_PROCESS.serve_here()
        deployments = [each.options(route_prefix=None) for each in deployments]
    elif blocking:
        serve_in_foreground(deployments, options, detached=detached)
        return
    else:
        before_start()
        instance = THIS_PROCESS.start(options, detached=detached, wait=False)
        show_output()
    goal = JointGoal(instance.state, [each.to_spec(instance.codec) for each in deployments])
    if wait:
        goal.wait()
        THIS_PROCESS.wait_until_ready()
    instance.put_declared_schedules(each.name for each in goal.goals)


def delete(name: str, _blocking: bool = True) -> None:
    """Delete an application, and return when its deployments are gone. Calls that were sent before are finished.

    Args:
        name: The name of the application, or of a deployment that belongs to none. Harmless where there is none.

    Raises:
        NoInstanceError: No instance is running.
    """
    if not _ignored("delete"):
        state = THIS_PROCESS.current().state
        delete_all(state, list(deployments_of(state, name)) or [name], wait=_blocking)


def shutdown() -> None:
    """Delete all deployments and stop the processes of the instance; harmless where there is none."""
    if not _ignored("shutdown"):
        THIS_PROCESS.shutdown()


async def shutdown_async() -> None:
    """`shutdown` for code on an event loop, which goes on meanwhile."""
    await asyncio.to_thread(shutdown)


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
    client = current_client().of_call(call_id)
    return attached_ref(client, codec_of(client), call_id)


copyreg.pickle(DurableRef, lambda ref: (get_ref, (ref.id,)))


def schedule(
    name: str, when: str, target: Deployment[Any] | DeploymentHandle[Any] | DurableHandle, /, *args: Any, **kwargs: Any
) -> None:
    """Make a durable call to a deployment at fixed times; replaces the schedule of that name.

    At the top level of a module it takes effect when its target is deployed from there (`qserve run`, `qserve deploy`,
    `serve.run`, `deploy()`): to import a module does nothing. The schedule stays until `unschedule`, even if its
    deployment is deleted. If no process could make the calls that were due, one call is made for all of them later.

    Args:
        name: The name of the schedule.
        when: "0 3 * * *" (minute, hour, day, month, weekday; in UTC, unless a time zone follows), or "every 30s".
        target: The deployment to call. For a method, or with retries and so on: a handle of it, made with
            `options(durable=True, ...)`.
        args, kwargs: The arguments of each call.

    Raises:
        ValueError: The name or the time is not possible.
        ValueNotSerializable, PayloadTooLarge: An argument cannot be sent.
        DeploymentNotFound, MethodNotFound: The target is not deployed, or has no such method.
        NoInstanceError: No instance is running.
    """
    declared = is_importing() or is_at_top_level(sys._getframe(1))
    handle = target.get_handle() if isinstance(target, Deployment) else target
    plan = plan_call(name, when, handle, args, kwargs)
    hooks = HookChain(load_hooks(Settings().hooks, ClientHook))
    with HookedCall(hooks, plan.deployment, plan.method, "call", durable=True) as hooked:
        plan = plan._replace(meta={**hooked.meta, **plan.meta})
        if declared:
            parse_when(plan.when)
            Declared.plans.append(plan)
        else:
            instance = THIS_PROCESS.current()
            instance.schedules.put(plan, instance.codec)
    hooked.end(None)


def unschedule(name: str) -> None:
    """Remove a schedule. Calls that it has submitted are not affected.

    Raises:
        KeyError: There is no schedule of that name.
        NoInstanceError: No instance is running.
    """
    if not _ignored("unschedule") and not THIS_PROCESS.current().schedules.remove(name):
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


def status() -> ServeStatus:
    """How every deployment is doing, by name; and every application, as `status().applications`.

    Raises:
        NoInstanceError: No instance is running.
    """
    return serve_status(THIS_PROCESS.current().state)


def _deployments_in(target: object) -> list[Deployment[Any]]:
    several: list[Any] = list(target) if isinstance(target, list | tuple) else [] if target is None else [target]
    for each in several:
        if not isinstance(each, Deployment):
            raise TypeError(
                f"serve.run() takes an application or deployments, not {each!r}. Decorate a class or function with "
                "@serve.deployment; an ASGI application is served by a class: @serve.deployment, and below it "
                "@serve.ingress(app)."
            )
    return several


def _options(given: HTTPOptions | Mapping[str, Any] | None) -> HTTPOptions:
    with told_in_words(HTTPOptions.model_fields):
        return given if isinstance(given, HTTPOptions) else HTTPOptions(**(given or {}))


def _refuse_old_options(kwargs: Mapping[str, Any]) -> None:
    for name in kwargs:
        if name in {"http_host", "http_port", "http_middlewares"}:
            option = name.removeprefix("http_")
            raise ValueError(f"{name} is not an option any more. Use http_options={{'{option}': ...}} instead.")
        if name not in {"dedicated_cpu", "grpc_options", "logging_config"}:
            where = f". Give it in http_options={{'{name}': ...}}" if name in HTTPOptions.model_fields else ""
            raise TypeError(f"start() got an unexpected keyword argument '{name}'{where}")
    warn_of(kwargs)


def _ignored(verb: str) -> bool:
    if is_importing():
        logger.debug("Importing is not deploying: serve.%s() does nothing.", verb)
        return True
    return False
