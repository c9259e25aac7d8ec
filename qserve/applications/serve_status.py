"""How deployments and applications are doing."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from qserve.applications.graph import own_name
from qserve.broker.instance.state import State
from qserve.deployments import deploying
from qserve.wire.spec import DEPLOY_FAILED, DEPLOYING, HEALTHY, WAITING, Deployed, ReplicaInfo

_IN_RAY: Final = {WAITING: "UPDATING", DEPLOYING: "UPDATING"}


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

    @property
    def status(self) -> str:
        """The state in Ray Serve's words: UPDATING, HEALTHY or DEPLOY_FAILED."""
        return _IN_RAY.get(self.state, self.state)

    @property
    def message(self) -> str:
        """What Ray Serve calls `error`."""
        return self.error

    @property
    def replica_states(self) -> dict[str, int]:
        """How many replicas are in which state."""
        return dict(Counter("RUNNING" if each.state == "SERVING" else each.state for each in self.replicas))


@dataclass(frozen=True)
class ApplicationStatus:
    """How an application is doing.

    Attributes:
        status: RUNNING, DEPLOYING or DEPLOY_FAILED.
        message: What went wrong last; "" if nothing did.
        route_prefix: The path under which it is served; None if it is not served over HTTP.
        last_deployed_time_s: Unix time of the first deploy of its root under this name.
        deployments: Its deployments, by the names that they have within it.
    """

    status: str
    message: str
    route_prefix: str | None
    last_deployed_time_s: float
    deployments: dict[str, DeploymentStatus]


class ServeStatus(dict[str, DeploymentStatus]):
    """How every deployment is doing, by name.

    Attributes:
        applications: How every application is doing, by name.
        proxies: "HEALTHY" for each gateway, by its URL.
    """

    def __init__(self, deployments: Mapping[str, DeploymentStatus]) -> None:
        super().__init__(deployments)
        self.applications: dict[str, ApplicationStatus] = {}
        self.proxies: dict[str, str] = {}


def serve_status(state: State) -> ServeStatus:
    """How everything that is deployed is doing."""
    listed = state.list()
    found = ServeStatus({name: _status_of(state, name, deployed) for name, deployed in listed.items()})
    found.proxies = {gateway.url: HEALTHY for gateway in state.observed.gateways().values()}
    for application in sorted({deployed.spec.application for deployed in listed.values()} - {""}):
        members = {name: each for name, each in listed.items() if each.spec.application == application}
        found.applications[application] = _application_status(application, members, found)
    return found


def _application_status(name: str, members: Mapping[str, Deployed], found: ServeStatus) -> ApplicationStatus:
    states = {found[each].state for each in members}
    errors = [f"{each}: {found[each].error}" for each in members if found[each].error]
    root = next((each for each in members.values() if each.spec.is_root), None)
    return ApplicationStatus(
        status=DEPLOY_FAILED if DEPLOY_FAILED in states else "RUNNING" if states == {HEALTHY} else DEPLOYING,
        message="\n".join(errors),
        route_prefix=root.spec.route_prefix if root is not None else None,
        last_deployed_time_s=root.spec.deployed_at if root is not None else 0.0,
        deployments={own_name(name, each): found[each] for each in members},
    )


def _status_of(state: State, name: str, deployed: Deployed) -> DeploymentStatus:
    scaling = deployed.spec.autoscaling
    workers = deploying.live_workers(state, name)
    condition, error = deploying.condition(deployed, workers)
    return DeploymentStatus(
        state=condition,
        error=error,
        version=deployed.spec.version,
        generation=deployed.generation,
        route_prefix=deployed.spec.route_prefix,
        replicas=tuple(state.observed.replicas(name).values()),
        queued=state.observed.queued(name),
        wanted=sum(worker.wanted for worker in workers),
        autoscaling_config=None if scaling is None else msgspec.structs.asdict(scaling),
    )
