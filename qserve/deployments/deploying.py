"""From a wanted spec to running replicas: version rules, waiting, rolling back, deleting.

The replicas themselves are rolled by the workers; this is the driver's half, on the thread of whoever called `deploy`.
"""

import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from logging import getLogger

import msgspec

from qserve.broker.records import fail_remaining_records
from qserve.broker.remains import fail_remaining
from qserve.broker.state import GenerationChanged, State
from qserve.broker.stream_ids import order
from qserve.errors import DeploymentNotFound
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
"""How long deploy and delete wait for gateways to follow."""
_ROLLBACK_TIMEOUT_S = 30.0
_DELETE_GRACE_S = 15.0
_SLOW_START_S = 30.0
_POLL_S = (0.002, 0.02)


# Version rules


def next_spec(wanted: DeploymentSpec, current: Deployed | None) -> DeploymentSpec:
    """What to write when `wanted` is deployed over `current`.

    An unchanged version keeps the code and constructor arguments that run and takes only the configuration, whatever
    the code looks like now; a new version, or none, is a new revision.

    Raises:
        ValueError: `prev_version` is not what is deployed.
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


def deploy(state: State, wanted: DeploymentSpec) -> "Goal":
    """Make `wanted` the desired state; `Goal.wait` sees it through.

    Raises:
        ValueError: `prev_version` does not hold, or the route belongs to another deployment.
    """
    while True:
        generation, current = state.generation(wanted.name), state.find(wanted.name)
        spec = next_spec(wanted, current)
        if current is not None and _changes_nothing(spec, current):
            state.sign_again(current)
            return Goal(state, current, current)
        try:
            return Goal(state, state.deploy(spec, expected=generation), current)
        except GenerationChanged:
            continue


class Goal:
    """One generation of a deployment on its way to being served everywhere.

    Attributes:
        deployed: The generation.
        superseded_by: The generation that took its place before it was reached, 0 for none.
    """

    def __init__(self, state: State, deployed: Deployed, previous: Deployed | None) -> None:
        self.deployed = deployed
        self.superseded_by = 0
        self._state = state
        self._previous = previous

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self.deployed.spec.name

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every live node serves it and every live gateway knows it.

        With no node alive it returns at once and leaves the deployment waiting for one; False when `timeout` is over.
        When another deploy takes its place, that is logged, and there is nothing left to wait for.

        Raises:
            RuntimeError: It failed, and what was there before is deployed again.
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
            message = "Failed to reach deployment goal. Check the serve logs for details."
            raise RuntimeError(f"{message}\n{progress.error}".rstrip())
        state = HEALTHY if progress.asked else WAITING
        self._state.settle(self.name, self.deployed.generation, state)
        if state == WAITING:
            logger.info("Deployed '%s'; it starts as soon as a node that serves it does.", self.name)
        wait_for_gateways(self._state, self.deployed.log_id)
        return True

    def progress(self) -> "Progress":
        """How far it is now."""
        return judge(self.name, self.deployed.generation, self._state)

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
        logger.error("Deployment '%s' failed: %s", self.name, error)
        previous = self._previous
        try:
            if previous is None or previous.state == DEPLOY_FAILED:
                delete(self._state, self.name, expected=self.deployed.generation)
            else:
                restored = Goal(
                    self._state, self._state.deploy(previous.spec, expected=self.deployed.generation), previous
                )
                restored._wait_for_workers(_ROLLBACK_TIMEOUT_S)
                self._state.settle(self.name, restored.deployed.generation, HEALTHY, error=error)
                wait_for_gateways(self._state, restored.deployed.log_id)
        except GenerationChanged:
            logger.info("'%s' was deployed again meanwhile; nothing to roll back.", self.name)
        except ValueError as exc:  # its old route was given away meanwhile
            logger.error("'%s' cannot be rolled back: %s", self.name, exc)


@dataclass(frozen=True)
class Progress:
    """How far a generation has come.

    Attributes:
        asked: Ids of the live nodes and hand-started workers that serve the deployment.
        reached: Those of them where it is served.
        wanted, ready: Replicas over all of them, as far as they have reported.
        error: Why it failed, or None.
        deleted: The deployment is gone.
        superseded_by: The newer generation that is deployed, 0 for none.
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
        """Nothing is left to wait for."""
        return self.error is not None or self.superseded_by > 0 or (not self.deleted and self.asked == self.reached)


def wanted(state: State, name: str) -> int:
    """How many replicas the live workers of a deployment are to have now."""
    return sum(w.wanted for id_, w in state.workers(name).items() if state.is_alive(id_))


def judge(name: str, generation: int, state: State) -> Progress:
    """How far a generation has come, by what nodes and workers report."""
    deployed = state.get(name)
    if deployed is None:
        return Progress(frozenset(), frozenset(), deleted=True)
    if deployed.generation > generation:
        return Progress(frozenset(), frozenset(), superseded_by=deployed.generation)
    nodes, workers = state.nodes(), state.workers(name)
    by_hand = {id_ for id_, worker in workers.items() if worker.node == worker.id and state.is_alive(id_)}
    return weigh(name, generation, nodes, {id_: w for id_, w in workers.items() if id_ in nodes or id_ in by_hand})


def weigh(name: str, generation: int, nodes: Mapping[str, NodeInfo], workers: Mapping[str, WorkerInfo]) -> Progress:
    """The same from facts: live nodes, and live workers by the id of their node."""
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
    """Note in the state how far a deployment has come; refuse its calls at once where nothing will ever take them."""
    deployed = state.get(name)
    if deployed is None:
        return
    progress = judge(name, deployed.generation, state)
    if progress.superseded_by:
        return
    if progress.error is not None:
        serving = any(info.state == SERVING and state.is_alive(id_) for id_, info in state.replicas(name).items())
        refuse = "" if serving else f"Deployment '{name}' failed: {(progress.error.strip().splitlines() or ['?'])[-1]}"
        state.settle(name, deployed.generation, DEPLOY_FAILED, error=progress.error, refuse=refuse)
    elif not progress.asked:
        state.settle(name, deployed.generation, WAITING)
    else:
        state.settle(name, deployed.generation, HEALTHY if progress.done else DEPLOYING)


# Deleting


def delete(state: State, name: str, *, expected: int | None = None) -> None:
    """Forget a deployment and wait until its calls are answered and its replicas gone. Harmless where there is none.

    Raises:
        GenerationChanged: It is not at generation `expected`.
    """
    current = state.find(name)
    log_id = state.delete(name, expected=expected)
    if current is not None and log_id is not None:
        wait_for_gateways(state, log_id)
        finish_deleting(state, current.spec)


def finish_deleting(state: State, spec: DeploymentSpec) -> None:
    """Wait until the replicas of a deployment that was deleted from the state are gone; answer what calls are left."""
    name = spec.name
    patience = spec.graceful_shutdown_timeout_s + _DELETE_GRACE_S
    for _ in _ticks(patience):
        if state.get(name) is not None:  # deployed again by someone else: what runs now is theirs
            return
        if not _left_of(state, name):
            break
    else:
        logger.warning("Deleted '%s', but %s did not end within %.0f s.", name, _left_of(state, name), patience)
    error = ErrorInfo(DeploymentNotFound.__name__, "", "", f"Deployment '{name}' was deleted.")
    fail_remaining(state.redis, state.keys, name, state.signer, encode(error))
    fail_remaining_records(state.redis, state.keys, name, state.signer, encode(error))
    state.forget_remains(name)


def _left_of(state: State, name: str) -> list[str]:
    found, nodes = state.replicas(name), state.nodes()
    replicas = [f"{info.tag} (pid {info.pid} on {info.host})" for id_, info in found.items() if state.is_alive(id_)]
    workers = [f"worker {info.pid} on {info.host}" for id_, info in state.workers(name).items() if id_ in nodes]
    return replicas + workers


# Gateways


def wait_for_gateways(state: State, log_id: str, timeout: float = GATEWAYS_TIMEOUT_S) -> None:
    """Wait until every live gateway has applied a log entry; after `timeout` warn and go on."""
    behind: list[GatewayInfo] = []
    for _ in _ticks(timeout):
        behind = [info for info in state.gateways().values() if order(info.applied) < order(log_id)]
        if not behind:
            return
    laggards = ", ".join(f"{info.url} (pid {info.pid} on {info.host})" for info in behind)
    logger.warning("These gateways have not taken over the change within %.0f s: %s.", timeout, laggards)


def _ticks(timeout: float | None) -> Iterator[float]:
    """Seconds passed, once right away and then at a growing interval until `timeout`."""
    started, pause = time.monotonic(), _POLL_S[0]
    while True:
        passed = time.monotonic() - started
        yield passed
        if timeout is not None and passed >= timeout:
            return
        time.sleep(pause)
        pause = min(pause * 1.5, _POLL_S[1])
