"""Desired and observed state as inert data: what is written to Redis by `state` and read by everyone."""

import msgspec

from qserve.wire.options import DeploymentOptions

WAITING, DEPLOYING, HEALTHY, DEPLOY_FAILED = "WAITING", "DEPLOYING", "HEALTHY", "DEPLOY_FAILED"
"""States of a deployment: no node alive; replicas on their way; serving as asked; given up (an older one may serve)."""

EVERY_NODE = "EveryNode"
"""The `HttpSettings.location` with a gateway beside every node."""

STARTING, STANDBY, SERVING, DRAINING = "STARTING", "STANDBY", "SERVING", "DRAINING"
"""States of a replica: constructing; constructed, waits for its predecessor; takes calls; finishes them and leaves."""


class Target(msgspec.Struct, frozen=True):
    """Where user code is: an import path, or (signed only) a cloudpickle of it.

    Attributes:
        import_path: "module:qualname", or "" when pickled.
        pickled: cloudpickle bytes, or b"".
        sys_path: Folders to put on `sys.path` before importing (the driver's working folder or script's folder).
    """

    import_path: str = ""
    pickled: bytes = b""
    sys_path: tuple[str, ...] = ()


class DeploymentSpec(DeploymentOptions, frozen=True, kw_only=True):
    """Everything a node needs to run a deployment: its options, and what was found out about its code.

    Attributes:
        target: Where the code is.
        revision: Identity of the code and the constructor's arguments: replicas of another revision are replaced. It
            stays while `version` does, and is new on each deploy where there is none.
        is_class: A class is constructed; a function is called as it is.
        is_ingress: An ASGI application answers its HTTP requests.
        deployed_at: Unix time of the first deploy under this name.
    """

    target: Target
    revision: str
    is_class: bool = True
    is_ingress: bool = False
    deployed_at: float = 0.0


class SignedSpec(msgspec.Struct, frozen=True, array_like=True):
    """What stands in the state: signed, so that no older spec can be put back under a newer generation."""

    generation: int
    spec: DeploymentSpec


class Deployed(msgspec.Struct, frozen=True):
    """A spec with the generation under which the state holds it.

    Attributes:
        generation: Rises by one with every deploy of this name.
        log_id: Entry id in the state log of the change that made it.
    """

    spec: DeploymentSpec
    generation: int
    state: str = WAITING
    error: str = ""
    log_id: str = "0-0"


class ReplicaInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One replica as it last described itself.

    Attributes:
        id: Process incarnation; consumer name and inbox name at once.
        tag: "<deployment>#<random>", shown to users.
        worker: Id of the Celery worker it belongs to.
        generation: Newest generation it has applied.
        p50_ms, p99_ms: Run times of recent calls, None before the first.
    """

    id: str
    tag: str
    worker: str
    node: str
    host: str
    pid: int
    generation: int
    revision: str
    state: str
    started_at: float
    running: int = 0
    handled: int = 0
    p50_ms: float | None = None
    p99_ms: float | None = None


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What one Celery worker has reached for its deployment.

    Attributes:
        node: Id of the node that keeps it running; its own id when it was started by hand.
        generation: The newest generation it has finished with (reached or failed).
        wanted: How many replicas it is to have now.
        state: DEPLOYING, HEALTHY or DEPLOY_FAILED.
        error: Text of the last constructor or reconfigure failure of this generation.
    """

    id: str
    node: str
    host: str
    pid: int
    generation: int
    state: str
    wanted: int
    ready: int
    error: str = ""


class NodeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A machine (or container) that runs workers. Liveness is the key `Keys.alive(id)`."""

    id: str
    host: str
    pid: int
    only: tuple[str, ...] = ()
    replicas_per_node: int | None = None


class GatewayInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One gateway process. Liveness is the key `Keys.alive(id)`; `applied` is the last state-log entry it follows."""

    id: str
    host: str
    pid: int
    url: str
    applied: str = "0-0"


class MiddlewareSpec(msgspec.Struct, frozen=True):
    """A Starlette middleware: import path of its class and packed (args, kwargs)."""

    target: Target
    arguments: bytes = b""


class HttpSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The part of `http_options` that every gateway needs; host and port belong to whoever starts one."""

    root_path: str = ""
    root_url: str = ""
    middlewares: tuple[MiddlewareSpec, ...] = ()
    location: str = "HeadOnly"
