"""The command line of a node."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from qserve.settings import Settings


@dataclass(frozen=True)
class NodeOptions:
    """The command line.

    Attributes:
        replicas_per_node: Replicas of each deployment here; None: each deployment's own num_replicas.
        only: Deployments to serve, empty for all.
        gateway: Keep gateways running on host and port; None: if the instance has them beside every node.
        gateway_workers: How many of them; they share the port.
        gateway_arguments: What else stands on their command lines.
        folder: For sockets and ready files; removed at the end.
        embedded: The Valkey is our own, in `folder`.
        data: Where it keeps its data; None: nowhere.
        owner: Pid of the process to end with.
        instance_file: Where to tell other processes of the user how to reach us.
        http: JSON of the http_options, for the instance file.
        imports: What the template is to import, because the first deployments need it.
        log_file: Where the standard error of this process goes, for the instance file; None: nowhere that has a name.
    """

    replicas_per_node: int | None = 1
    only: tuple[str, ...] = ()
    gateway: bool | None = None
    gateway_workers: int = 1
    gateway_arguments: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    folder: Path | None = None
    embedded: bool = False
    data: Path | None = None
    owner: int | None = None
    instance_file: Path | None = None
    http: str = "{}"
    imports: tuple[str, ...] = ()
    log_file: Path | None = None


def parse(arguments: list[str], description: str | None = None) -> NodeOptions:
    """Options from a command line; the description is for its help."""
    parser = argparse.ArgumentParser(prog="python -m qserve_workers.node", description=description)
    parser.add_argument("--replicas-per-node", type=int, default=1, metavar="N")
    parser.add_argument("--exact", action="store_true", help="run each deployment's own num_replicas instead")
    parser.add_argument("--only", default="", metavar="A,B", help="serve only these deployments")
    parser.add_argument("--gateway", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--gateway-workers", type=int, default=1, metavar="N")
    parser.add_argument("--gateway-argument", dest="gateway_arguments", action="append", default=[], metavar="ARG")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--owner", type=int)
    parser.add_argument("--instance-file", type=Path)
    parser.add_argument("--http", default="{}")
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE")
    parser.add_argument("--log-file", type=Path)
    found = vars(parser.parse_args(arguments))
    if found.pop("exact"):
        found["replicas_per_node"] = None
    found["only"] = tuple(name.strip() for name in found["only"].split(",") if name.strip())
    found["gateway_arguments"], found["imports"] = tuple(found["gateway_arguments"]), tuple(found["imports"])
    return NodeOptions(**found)


def child_environment(options: NodeOptions, settings: Settings, node: str) -> dict[str, str]:
    """What the processes of a node find in their environment beside its own.

    Args:
        node: Its id.
    """
    # Nobody but this user reaches the embedded server.
    trusted = options.embedded and settings.celery_calls is None
    celery_calls = {"QSERVE_CELERY_CALLS": "1"} if trusted else {}
    exact = {"QSERVE_REPLICAS_EXACT": "1"} if options.replicas_per_node is None else {}
    return {
        "QSERVE_REDIS_URL": settings.redis_url,
        "QSERVE_SECRET": settings.secret,
        "QSERVE_NAMESPACE": settings.namespace,
        "QSERVE_NODE": node,
        **exact,
        **celery_calls,
    }
