"""From a wanted spec to running replicas: version rules, waiting, rolling back, deleting.

This is the half of the process that deploys, and it runs on the thread that called `deploy`. The workers replace the
replicas.
"""

import contextlib
import secrets
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from logging import getLogger
from typing import Literal

import msgspec

from qserve.broker.instance.state import GenerationChanged, State
from qserve.broker.stream_ids import order
from qserve.errors import BrokerUnavailable, DeploymentNotFound, FrameRejected
from qserve.wire.messages import ErrorInfo, encode
from qserve.wire.spec import (
    DEPLOY_FAILED,
    DEPLOYING,
    HEALTHY,
    SERVING,
    WAITING,
    Deployed,
    DeploymentSpec,
    GatewayInfo,
    NodeInfo,
    WorkerInfo,
)

logger = getLogger(__name__)

GATEWAYS_TIMEOUT_S = 10.0
"""How long `deploy` and `delete` wait until all gateways have taken over a change."""
_ROLLBACK_TIMEOUT_S = 30.0
_DELETE_GRACE_S = 15.0
_SLOW_START_S = 30.0
_REDIS_BACK_WITHIN_S = 30.0
"""For how long Redis may be away while a deploy waits."""
_POLL_S = (0.002, 0.02)


# Version rules


def next_spec(wanted: DeploymentSpec, current: Deployed | None) -> DeploymentSpec:
    """The spec to write when `wanted` is deployed over `current`.

    An unchanged version keeps the code and the constructor arguments that run, whatever the code looks like now, and
    takes over only the other options. A new version, or none, makes a new revision.

    Raises:
        ValueError: `prev_version` is not the version that is deployed.
    """
    _check_prev_version(wanted, current)
    if current is None:
        return msgspec.structs.replace(wanted, revision=secrets.token_hex(8), deployed_at=time.time())
    running = current.spec
    if wanted.version is None or wanted.version != running.version or current.state == DEPLOY_FAILED:
        return msgspec.structs.replace(wanted, revision=secrets.token_hex(8), deployed_at=running.deployed_at)
    return msgspec.structs.replace(
        wanted,
        revision=running.revision,
        target=running.target,
        sources=running.sources,
        methods=running.methods,
        init_args=running.init_args,
        is_class=running.is_class,
        is_ingress=running.is_ingress,
        deployed_at=running.deployed_at,
    )


def _check_prev_version(wanted: DeploymentSpec, current: Deployed | None) -> None:
    if wanted.prev_version is None:
        return
    deployed = current.spec.version if current else None
    if deployed is None:
        raise ValueError(
            f"prev_version '{wanted.prev_version}' is specified but there is no existing deployment of "
            f"'{wanted.name}' with a version."
        )
    if deployed != wanted.prev_version:
        raise ValueError(
            f"prev_version '{wanted.prev_version}' does not match with the existing version '{deployed}' of "
            f"'{wanted.name}'."
        )


def _changes_nothing(spec: DeploymentSpec, current: Deployed | None) -> bool:
    return current is not None and msgspec.structs.replace(spec, prev_version=current.spec.prev_version) == current.spec


# Deploying


def deploy(state: State, wanted: DeploymentSpec, moving: Collection[str] = ()) -> "Goal":
    """Make `wanted` the desired state of its name, and return the goal that tells when it is reached.

    Args:
        state: Of the instance.
        wanted: What should run.
        moving: Deployments that are given another route right after this one, so that theirs are free.

    Raises:
        ValueError: `prev_version` is not the version that is deployed, or the route belongs to another deployment.
    """
    while True:
        generation, current = state.generation(wanted.name), state.find(wanted.name)
        spec = next_spec(wanted, current)
        if current is not None and _changes_nothing(spec, current):
            state.sign_again(current)
            return Goal(state, current, current)
        before = _former(state, wanted.name) if current is not None else None
        replaces = current is not None and current.spec.revision != spec.revision and _has_served(state, current)
        try:
            deployed = state.deploy(spec, expected=generation, former=current if replaces else None, moving=moving)
            return Goal(state, deployed, current, before)
        except GenerationChanged:
            continue


def _former(state: State, name: str) -> DeploymentSpec | None:
    with contextlib.suppress(FrameRejected):  # signed with a key that is none of ours any more
        return state.former(name)
    return None


def _has_served(state: State, deployed: Deployed) -> bool:
    """Whether it can be gone back to: it has not failed, or replicas of it serve all the same."""
    return deployed.state != DEPLOY_FAILED or _is_served(state, deployed.spec)


def _is_served(state: State, spec: DeploymentSpec) -> bool:
    return any(
        info.state == SERVING and info.revision == spec.revision and state.observed.is_alive(id_, spec.name)
        for id_, info in state.observed.replicas(spec.name).items()
    )


class Goal:
    """One generation of a deployment on its way to being served everywhere.

    Args:
        previous: What was deployed until then.
        before: What was served before `previous`, as far as it is known.

    Attributes:
        deployed: The generation.
        superseded_by: The generation that took its place before it was reached, or 0.
    """

    def __init__(
        self, state: State, deployed: Deployed, previous: Deployed | None, before: DeploymentSpec | None = None
    ) -> None:
        self.deployed = deployed
        self.superseded_by = 0
        self._state = state
        self._previous = previous
        self._before = before
        self._seen = Progress(frozenset({""}), frozenset())
        self._lost_at: float | None = None

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self.deployed.spec.name

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every live node serves this generation and every live gateway knows it.

        With no node alive it returns at once, and the deployment waits for a node. When another deploy takes its
        place, it logs a warning and returns.

        Returns:
            False when `timeout` seconds have passed before that.

        Raises:
            RuntimeError: The generation failed. The generation before it is deployed again, or the deployment is
                deleted where there was none.
            BrokerUnavailable: Redis has been away for half a minute.
        """
        progress = self._wait_for_workers(timeout)
        if progress is None:
            return False
        if progress.superseded_by:
            self.superseded_by = progress.superseded_by
            logger.warning(
                "SUPERSEDED: generation %d of '%s' was replaced by generation %d, deployed by somebody else before all "
                "replicas had it. Generation %d is rolled out now, and nothing is left of this one.",
                *(self.deployed.generation, self.name, self.superseded_by, self.superseded_by),
            )
            return True
        if progress.error is not None:
            self._roll_back(progress.error)
            message = f"Failed to reach deployment goal. Check the serve logs for details. Deployment '{self.name}':"
            raise RuntimeError(f"{message}\n{progress.error}".rstrip())
        state = HEALTHY if progress.asked else WAITING
        self._state.set_state(self.name, self.deployed.generation, state)
        if state == WAITING:
            logger.info(
                "Deployed '%s'. No node that serves it is alive; its replicas start as soon as one is.", self.name
            )
        wait_for_gateways(self._state, self.deployed.log_id)
        return True

    def progress(self) -> "Progress":
        """How far the generation has come by now; while Redis is away, how far it was before.

        Raises:
            BrokerUnavailable: Redis has been away for too long.
        """
        try:
            self._seen = judge(self.name, self.deployed.generation, self._state)
        except BrokerUnavailable as exc:
            now = time.monotonic()
            self._lost_at = now if self._lost_at is None else self._lost_at
            if now - self._lost_at >= _REDIS_BACK_WITHIN_S:
                said = f"{exc}. '{self.name}' is rolled out all the same, and nobody rolls it back if that fails"
                raise BrokerUnavailable(f"{said}: `qserve status` shows how far it is") from exc
        else:
            self._lost_at = None
        return self._seen

    def _wait_for_workers(self, timeout: float | None) -> "Progress | None":
        started, warned = time.monotonic(), False
        for waited in _ticks(timeout):
            progress = self.progress()
            if progress.done:
                return progress
            if progress.deleted:
                raise RuntimeError(f"'{self.name}' was deleted while it was being deployed.")
            if waited > _SLOW_START_S and not warned:
                warned = True
                logger.warning(
                    "Deployment '%s' has %d of %d replicas that have taken more than %.0f s to start.",
                    *(self.name, progress.wanted - progress.ready, progress.wanted, time.monotonic() - started),
                )
        return None

    def _roll_back(self, error: str) -> None:
        logger.info("Deployment '%s' failed, and is rolled back.", self.name)  # why is raised
        state, generation, left = self._state, self.deployed.generation, ""
        try:
            for spec, former in self._worth_restoring():
                restored = Goal(state, state.deploy(spec, expected=generation, former=former), None)
                generation = restored.deployed.generation
                progress = restored._wait_for_workers(_ROLLBACK_TIMEOUT_S)
                left = progress.error or "" if progress is not None else ""
                if not left:
                    state.set_state(self.name, generation, DEPLOYING if progress is None else HEALTHY, error=error)
                    wait_for_gateways(state, restored.deployed.log_id)
                    return
            if left:
                state.set_state(self.name, generation, DEPLOY_FAILED, error=left)
            else:
                delete(state, self.name, expected=generation)
        except GenerationChanged:
            logger.info("'%s' has been deployed again meanwhile, so nothing is rolled back.", self.name)
        except ValueError as exc:  # another deployment has taken its old route meanwhile
            logger.error("'%s' cannot be rolled back: %s", self.name, exc)

    def _worth_restoring(self) -> Iterator[tuple[DeploymentSpec, Deployed | Literal[""]]]:
        """What may be put back, the best first, and what was served before it: what was deployed until now, unless it
        had failed, and what replicas have gone on to serve while that did not come up."""
        previous, before = self._previous, self._before
        if previous is not None and _has_served(self._state, previous):
            yield previous.spec, Deployed(before, 0) if before is not None else ""
        if before is not None and _is_served(self._state, before):
            yield before, ""


@dataclass(frozen=True)
class Progress:
    """How far a generation has come.

    Attributes:
        asked: Ids of the live nodes and hand-started workers that serve the deployment.
        reached: Those of them where it is served.
        wanted, ready: Replicas that all of them together should have and have, as far as they have reported.
        error: Why it failed; None while it has not.
        deleted: The deployment has been deleted.
        superseded_by: The newer generation that is deployed, or 0.
    """

    asked: frozenset[str]
    reached: frozenset[str]
    wanted: int = 0
    ready: int = 0
    error: str | None = None
    deleted: bool = False
    superseded_by: int = 0

    @property
    def done(self) -> bool:
        """Whether there is nothing left to wait for."""
        return self.error is not None or self.superseded_by > 0 or (not self.deleted and self.asked == self.reached)


def live_workers(state: State, name: str) -> list[WorkerInfo]:
    """What the live workers of a deployment have reported."""
    return [w for id_, w in state.observed.workers(name).items() if state.observed.is_alive(id_, name)]


def wanted(state: State, name: str) -> int:
    """How many replicas the live workers of a deployment should have now."""
    return sum(worker.wanted for worker in live_workers(state, name))


def condition(deployed: Deployed, workers: Iterable[WorkerInfo]) -> tuple[str, str]:
    """The state of a deployment now, and what is wrong with it.

    One that was HEALTHY is not where no replica has come up since: what its constructor needs may be away.
    """
    reports = list(workers)
    failures = [worker.error for worker in reports if worker.error]
    is_down = bool(failures) and not any(worker.ready for worker in reports)
    state = DEPLOYING if deployed.state == HEALTHY and is_down and not deployed.asleep else deployed.state
    missing = next((worker.error for worker in reports if worker.error and worker.ready < worker.wanted), "")
    return state, missing or deployed.error


def judge(name: str, generation: int, state: State) -> Progress:
    """Judge how far a generation has come, from what nodes and workers have reported."""
    deployed = state.get(name)
    if deployed is None:
        return Progress(frozenset(), frozenset(), deleted=True)
    if deployed.generation > generation:
        return Progress(frozenset(), frozenset(), superseded_by=deployed.generation)
    nodes = {id_: node for id_, node in state.observed.nodes().items() if not node.drained}
    if deployed.asleep:  # there is nothing to wait for: the first call starts what is deployed
        return Progress(frozenset(nodes), frozenset(nodes))
    workers = state.observed.workers(name)
    by_hand = {id_ for id_, w in workers.items() if w.node == w.id and state.observed.is_alive(id_, name)}
    return weigh(name, generation, nodes, {id_: w for id_, w in workers.items() if id_ in nodes or id_ in by_hand})


def weigh(name: str, generation: int, nodes: Mapping[str, NodeInfo], workers: Mapping[str, WorkerInfo]) -> Progress:
    """Judge how far a generation has come, given the nodes that run anything and the live workers by their nodes."""
    asked = {id_ for id_, node in nodes.items() if not node.only or name in node.only} | set(workers)
    current = {id_: worker for id_, worker in workers.items() if worker.generation >= generation}
    failures = [w.error for w in current.values() if w.state == DEPLOY_FAILED and w.generation == generation]
    return Progress(
        frozenset(asked),
        frozenset(id_ for id_, worker in current.items() if worker.state == HEALTHY),
        wanted=sum(worker.wanted for worker in workers.values()),
        ready=sum(worker.ready for worker in current.values()),
        error=failures[0] if failures else None,
    )


def settle(state: State, name: str) -> None:
    """Write to the state how far a deployment has come. Where no replica will ever take its calls, they are refused."""
    deployed = state.get(name)
    if deployed is None:
        return
    progress = judge(name, deployed.generation, state)
    if progress.superseded_by:
        return
    if progress.error is not None:
        serving = any(
            info.state == SERVING and state.observed.is_alive(id_, name)
            for id_, info in state.observed.replicas(name).items()
        )
        refuse = "" if serving else f"Deployment '{name}' failed: {(progress.error.strip().splitlines() or ['?'])[-1]}"
        state.set_state(name, deployed.generation, DEPLOY_FAILED, error=progress.error, refuse=refuse)
    elif not progress.asked:
        state.set_state(name, deployed.generation, WAITING)
    else:
        state.set_state(name, deployed.generation, HEALTHY if progress.done else DEPLOYING)


# Deleting


def delete(state: State, name: str, *, expected: int | None = None) -> None:
    """Delete a deployment, and wait until its calls are answered and its replicas gone. Harmless where there is none.

    Raises:
        GenerationChanged: The deployment is not at generation `expected`.
    """
    current = state.find(name)
    log_id = state.delete(name, expected=expected)
    if current is not None and log_id is not None:
        wait_for_gateways(state, log_id)
        finish_deleting(state, current.spec)


def finish_deleting(state: State, spec: DeploymentSpec) -> None:
    """Wait until the replicas of a deleted deployment are gone, then answer the calls that are left with an error."""
    name = spec.name
    patience = spec.graceful_shutdown_timeout_s + _DELETE_GRACE_S
    for _ in _ticks(patience):
        if state.get(name) is not None:  # deployed again by somebody else, to whom the replicas belong now
            return
        if not _left_of(state, name):
            break
    else:
        logger.warning(
            "Deleted '%s', but these have not ended within %.0f s: %s.",
            name,
            patience,
            ", ".join(_left_of(state, name)),
        )
    error = ErrorInfo(DeploymentNotFound.__name__, "", "", f"Deployment '{name}' was deleted.")
    state.clear_up(name, encode(error))


def _left_of(state: State, name: str) -> list[str]:
    observed = state.observed
    found, nodes = observed.replicas(name), observed.nodes()
    replicas = [
        f"{info.tag} (pid {info.pid} on {info.host})" for id_, info in found.items() if observed.is_alive(id_, name)
    ]
    workers = [f"worker {info.pid} on {info.host}" for id_, info in observed.workers(name).items() if id_ in nodes]
    return replicas + workers


# Gateways


def wait_for_gateways(state: State, log_id: str, timeout: float = GATEWAYS_TIMEOUT_S) -> None:
    """Wait until every live gateway has applied an entry of the state log; after `timeout` seconds, warn and return."""
    behind: list[GatewayInfo] = []
    for _ in _ticks(timeout):
        behind = [info for info in state.observed.gateways().values() if order(info.applied) < order(log_id)]
        if not behind:
            return
    laggards = ", ".join(f"{info.url} (pid {info.pid} on {info.host})" for info in behind)
    logger.warning("These gateways have not taken over the change within %.0f s: %s.", timeout, laggards)


def _ticks(timeout: float | None) -> Iterator[float]:
    """Yield the seconds that have passed: at once, then at growing intervals until `timeout`."""
    started, pause = time.monotonic(), _POLL_S[0]
    while True:
        passed = time.monotonic() - started
        yield passed
        if timeout is not None and passed >= timeout:
            return
        time.sleep(pause)
        pause = min(pause * 1.5, _POLL_S[1])
