"""`qserve start`: this machine's share of an instance, in the foreground."""

import contextlib
import os
import sys
import tempfile

import click

from qserve.broker.server.redis_checks import require_usable_at
from qserve.cli.gateway_options import gateway_arguments, gateway_options
from qserve.cli.instance import check_port
from qserve.cli.output import redis_url_option
from qserve.deployments.local_instance import find_settings, require_extras
from qserve.errors import BrokerUnavailable


@click.command()
@redis_url_option
@click.option("--only", metavar="NAMES", help="Run only these deployments, separated by commas.")
@click.option(
    "--replicas-per-node",
    type=click.IntRange(min=1),
    help="Number of replicas of each deployment on this machine. Default: 1.",
)
@click.option(
    "--gateway/--no-gateway",
    default=None,
    help="Run an HTTP gateway here, too. Default: only if the instance was started with location EveryNode.",
)
@click.option("--host", default="127.0.0.1", help="Address the gateway listens on.", show_default=True)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, help="Port the gateway listens on.", show_default=True
)
@gateway_options
def start(
    only: str | None,
    replicas_per_node: int | None,
    gateway: bool | None,
    host: str,
    port: int,
    gateway_workers: int,
    **tls: str | None,
) -> None:
    """Run this machine's workers (and gateway) for an instance, until Ctrl-C.

    The node reads from Redis what is deployed and keeps one Celery worker per deployment running. While Redis cannot be
    reached it waits.
    """
    settings = find_settings()
    require_extras(serves_http=bool(gateway))
    with contextlib.suppress(BrokerUnavailable):  # the node says so, and waits for it
        require_usable_at(settings.redis_url)
    os.environ |= {"QSERVE_REDIS_URL": settings.redis_url, "QSERVE_SECRET": settings.secret}
    command = [sys.executable, "-m", "qserve_workers.node"]
    if only is not None:
        command += ["--only", only]
    if replicas_per_node is not None:
        command += ["--replicas-per-node", str(replicas_per_node)]
    if gateway:
        check_port(host, port)
    command += [] if gateway is None else ["--gateway" if gateway else "--no-gateway"]
    if gateway is not False:
        folder = tempfile.mkdtemp(prefix="qs-")  # the node removes it
        command += ["--host", host, "--port", str(port), "--folder", folder]
        command += ["--gateway-workers", str(gateway_workers)]
        command += [f"--gateway-argument={argument}" for argument in gateway_arguments(**tls)]
    # The node takes this process' place, so signals, exit code and process id are its own.
    os.execv(sys.executable, command)  # noqa: S606 (no shell is what we want)
