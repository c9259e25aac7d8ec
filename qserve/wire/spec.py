"""What should run and what does run, as data: `qserve.broker.instance.state` writes and reads it."""

import msgspec

from qserve.wire.options import DeploymentOptions

WAITING, DEPLOYING, HEALTHY, DEPLOY_FAILED = "WAITING", "DEPLOYING", "HEALTHY", "DEPLOY_FAILED"
"""States of a deployment: no node is alive; replicas are starting; it serves; it has failed (what was there before may
serve)."""

EVERY_NODE = "EveryNode"
"""The `HttpSettings.location` that has a gateway beside every node."""

STARTING, STANDBY, SERVING, DRAINING = "STARTING", "STANDBY", "SERVING", "DRAINING"
"""States of a replica: it is being constructed; it waits until its predecessor has finished; it takes calls; it
finishes calls and leaves."""

STALLED, UNHEALTHY = "STALLED", "UNHEALTHY"
"""What others see of a replica that serves while something is wrong: its event loop is blocked; its `check_health`
keeps failing, and it is being replaced."""


class Target(msgspec.Struct, frozen=True):
    """Where user code is: an import path, or a pickle of it, which only signed specs may hold.

    Attributes:
        import_path: "module:qualname", or "" if it is pickled.
        pickled: Bytes of cloudpickle, or b"".
        sys_path: Folders to put on `sys.path` before importing.
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
        application: The application that it belongs to; "" if it was deployed by itself.
        is_root: It is the one that serves its application over HTTP.
        declared: Of the root of an application that comes from a config file, what the file says about where it comes
            from, as JSON: `import_path` and `args`. Otherwise "".
        task_queue: The queue whose tasks it consumes; "" if it consumes none.
        task_names: The names of the tasks that it has handlers for.
        methods: The names under which something can be called; () where that is not known.
        sources: The source files that the code is imported from, each with a digest, as they were when it was deployed.
    """

    target: Target
    revision: str
    is_class: bool = True
    is_ingress: bool = False
    deployed_at: float = 0.0
    application: str = ""
    is_root: bool = False
    declared: str = ""
    task_queue: str = ""
    task_names: tuple[str, ...] = ()
    sources: tuple[tuple[str, str], ...] = ()
    methods: tuple[str, ...] = ()


class SignedSpec(msgspec.Struct, frozen=True, array_like=True):
    """A spec with its generation: signed together, so that an older spec cannot be put in the place of a newer one."""

    generation: int
    spec: DeploymentSpec


class Deployed(msgspec.Struct, frozen=True):
    """A spec with the generation under which the state holds it.

    Attributes:
        generation: The number of deploys under this name.
        log_id: The id of the entry in the state log that says so.
        paused: Since when (Unix time) and by whom its calls are accepted, but not run, with a space between; "" while
            they are run. See `pause_of`.
        asleep: It has no replicas, because nobody calls it; a call wakes it.
    """

    spec: DeploymentSpec
    generation: int
    state: str = WAITING
    error: str = ""
    log_id: str = "0-0"
    paused: str = ""
    asleep: bool = False


def pause_of(paused: str) -> tuple[float | None, str]:
    """Since when (Unix time) nothing is run, as far as that is known, and who wants it so.

    Args:
        paused: `Deployed.paused` or `NodeInfo.drained`, not empty.
    """
    since, _, who = paused.partition(" ")
    return (float(since), who) if who and since.isascii() and since.isdecimal() else (None, "somebody")


class ReplicaInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One replica as it last described itself.

    Attributes:
        id: Names this run of its process, its consumer in the queue and its inbox.
        tag: "<deployment>#<random>", which is shown to users.
        worker: The id of its Celery worker.
        generation: The newest generation that it has applied.
        p50_ms, p99_ms: How long recent calls ran; None before the first.
        problem: What is wrong with it, or what it waits for; "" if nothing is.
        gpus: The GPUs that it has, and which part of each; "" if it has asked for none.
        gauges: The gauges that user code has set.
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
    problem: str = ""
    gpus: str = ""
    gauges: dict[str, float] = {}


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """How far one Celery worker has come with its deployment.

    Attributes:
        node: The id of the node that keeps it running; its own id if it was started by hand.
        generation: The newest generation that it has reached, or has given up.
        wanted: How many replicas it should have now.
        ready: How many of them serve.
        state: DEPLOYING, HEALTHY or DEPLOY_FAILED.
        error: Why a constructor or `reconfigure` failed last in this generation.
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
    """A node, which runs workers. It is alive while the key `Keys.alive(id)` exists.

    Attributes:
        drained: Since when (Unix time) and by whom it is to run nothing, with a space between; "" while it does.
    """

    id: str
    host: str
    pid: int
    only: tuple[str, ...] = ()
    replicas_per_node: int | None = None
    drained: str = ""


class GatewayInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway process. It is alive while the key `Keys.alive(id)` exists.

    Attributes:
        machine: Where its pid counts, as `this_host` says; "" where that cannot be told. Containers that share a host
            name have pids of their own.
        applied: The id of the last entry of the state log that it has applied.
    """

    id: str
    host: str
    pid: int
    url: str
    machine: str = ""
    applied: str = "0-0"


class MiddlewareSpec(msgspec.Struct, frozen=True):
    """A Starlette middleware: where its class is, and its packed arguments."""

    target: Target
    arguments: bytes = b""


class HttpSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The `http_options` that every gateway needs; host and port are for the process that starts one."""

    root_path: str = ""
    root_url: str = ""
    middlewares: tuple[MiddlewareSpec, ...] = ()
    location: str = "HeadOnly"
