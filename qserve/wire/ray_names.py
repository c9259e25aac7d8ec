"""What programs for Ray Serve say and qserve does not do: taken with a warning, once a process, or refused."""

import logging
from collections.abc import Iterable, Mapping
from typing import Final

logger = logging.getLogger("qserve")

WITHOUT_EFFECT: Final[Mapping[str, str]] = {
    "logging_config": (
        "replicas log as QSERVE_LOG_LEVEL and QSERVE_LOG_FORMAT say; see docs/telemetry.md#logs, and QSERVE_ACCESS_LOG"
    ),
    "max_surge_percent": "at most max(1, 20 %) of the replicas are replaced at a time; see surge=",
    "rolling_update_percentage": "at most max(1, 20 %) of the replicas are replaced at a time",
    "external_scaler_enabled": "any program may change the number of replicas, as `qserve scale` does",
    "max_replicas_per_node": "each node runs as many replicas as its --replicas-per-node says",
    "runtime_env": "only its env_vars are set; packages belong into the environment in which nodes are started",
    "policy": "the number of replicas follows what is queued and running",
    "proxy_location": "it is http_options={'location': ...} here",
    "dedicated_cpu": "processes are not bound to processors",
    "grpc_options": "there is no gRPC; HTTP and handles go on working",
}
"""What is taken and has no effect, with what there is instead."""

REFUSED: Final[Mapping[str, str]] = {
    "placement_group_bundles": "There are no placement groups: a replica is one process on one node.",
    "placement_group_strategy": "There are no placement groups: a replica is one process on one node.",
    "placement_group_bundle_label_selector": "There are no placement groups: a replica is one process on one node.",
    "placement_group_fallback_strategy": "There are no placement groups: a replica is one process on one node.",
    "gang_scheduling_config": "There are no gangs of replicas: each replica is started and replaced by itself.",
    "deployment_actors": "There are no deployment actors. Make what is shared a deployment, and bind it.",
    "request_router_config": (
        "There are no request routers: calls wait in one queue, and a free replica takes the next one. For models that "
        "not every replica holds, use @serve.multiplexed."
    ),
    "request_router_class": "There are no request routers: calls wait in one queue, and a free replica takes the next.",
}
"""Options that cannot be had, with the sentence that says so."""

MODULES_OF_SERVE: Final = frozenset({"api", "config", "exceptions", "handle", "schema"})
"""Modules of Ray Serve whose names are in `qserve.serve` itself."""

_NO_ROUTERS: Final = REFUSED["request_router_config"]
_NO_GRPC: Final = "There is no gRPC: deployments are called over HTTP and through handles."
_NO_SCHEMAS: Final = (
    "Config files are read, written and described by commands: `qserve deploy`, `qserve build`, `qserve schema`. "
    "`serve.status()` tells what runs."
)
_NO_LLM: Final = "There is no ray.serve.llm: make the engine in the constructor of a deployment, and stream from it."
_NO_GRADIO: Final = "There is no integration of Gradio: mount it in a FastAPI app, and serve that with @serve.ingress."

MISSING: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("RequestRouterConfig", "RequestRouter", "PendingRequest", "ReplicaID", "ReplicaResult"), _NO_ROUTERS
    ),
    **dict.fromkeys(("RunningReplica", "FIFOMixin", "LocalityMixin", "MultiplexMixin"), _NO_ROUTERS),
    **dict.fromkeys(("gRPCOptions", "RayServegRPCContext", "gRPCInputStream"), _NO_GRPC),
    **dict.fromkeys(("ServeDeploySchema", "ServeApplicationSchema", "DeploymentSchema"), _NO_SCHEMAS),
    **dict.fromkeys(("ServeInstanceDetails", "ApplicationDetails", "DeploymentDetails"), _NO_SCHEMAS),
    **dict.fromkeys(("LLMConfig", "LLMServer", "LLMRouter", "build_llm_deployment", "build_openai_app"), _NO_LLM),
    **dict.fromkeys(("GradioIngress", "GradioServer"), _NO_GRADIO),
    "GangSchedulingConfig": REFUSED["gang_scheduling_config"],
    "DeploymentActorConfig": REFUSED["deployment_actors"],
    "DeploymentMode": "Use qserve.serve.Location.",
    "DAGDriver": "Bind deployments as arguments of a deployment that has the routes, with @serve.ingress.",
    "llm": _NO_LLM,
    "request_router": _NO_ROUTERS,
    **dict.fromkeys(
        ("task_consumer", "task_handler", "task_processor", "instantiate_adapter_from_config"), "It is in qserve.tasks."
    ),
}
"""Names of Ray Serve's modules that `qserve.serve` does not have, with what there is instead."""

_told: set[str] = set()


def warn_once(name: str) -> None:
    """Warn that something has no effect here, unless this process has done so before."""
    if name not in _told:
        _told.add(name)
        logger.warning("%s has no effect in qserve: %s.", name, WITHOUT_EFFECT[name])


def warn_of(given: Mapping[str, object]) -> None:
    """Warn of each option that was given."""
    for name, value in given.items():
        if value:
            warn_once(name)


def refuse_unavailable(names: Iterable[str]) -> None:
    """Raise for the first name that stands for something qserve does not have.

    Raises:
        ValueError: There is such a name.
    """
    for name in names:
        if name in REFUSED:
            raise ValueError(f"{name} is not available in qserve. {REFUSED[name]}")


def refuse_missing(name: str) -> None:
    """Raise for a name of Ray Serve that does not exist here.

    Raises:
        ImportError: It is one; `from qserve.serve import` would hide the sentence of an AttributeError.
    """
    if name in MISSING:
        raise ImportError(f"qserve.serve has no {name!r}, which Ray Serve has. {MISSING[name]}", name=name)
