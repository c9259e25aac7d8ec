"""`qserve deploy`, `delete`, `shutdown`: change what a running instance serves."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qserve.cli.call import unknown_deployment
from qserve.cli.output import Failure, log_to_stderr, note, redis_url_option

if TYPE_CHECKING:
    from qserve.deployment import Deployment


@click.command()
@redis_url_option
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="Seconds to wait for Redis to answer; then the command fails.",
)
@click.argument("app", metavar="MODULE[:NAME]", envvar="QSERVE_APP")
def deploy(app: str, timeout: float) -> None:
    """Deploy what is defined in a module (or one NAME of it) into a running instance.

    Deployments without a version get a hash of their code and arguments as version, so doing it again changes nothing.
    """
    from qserve.cli.instance import find_redis_url

    log_to_stderr()
    url = find_redis_url()
    deployments = import_from_here(app)
    wait_for_redis(url, timeout)
    for deployment in deployments:
        with_version = versioned(deployment)
        deploy_one(with_version)
        note(f"{with_version.name}: deployed version {with_version.version}")


@click.command()
@redis_url_option
@click.argument("name")
def delete(name: str) -> None:
    """Stop serving the deployment NAME; calls that were already accepted are finished."""
    from qserve import serve
    from qserve.cli.instance import connected

    with connected() as state:
        if state.get(name) is None:
            raise Failure(unknown_deployment(name, state.list()))
    serve.get_deployment(name).delete()
    note(f"{name}: deleted")


@click.command()
@redis_url_option
def shutdown() -> None:
    """Delete every deployment and stop the instance running on this machine."""
    from qserve import serve

    serve.shutdown()
    note("Shut down.")


def import_from_here(app: str) -> "list[Deployment]":
    """The deployments of MODULE[:NAME], imported as if from the current folder.

    Raises:
        ConfigurationError: It cannot be imported, or there is nothing to deploy in it.
    """
    from qserve.loading import import_app

    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return import_app(app)


def versioned(deployment: "Deployment") -> "Deployment":
    """The deployment with a version: its own, or one made of its content."""
    if deployment.version is not None:
        return deployment
    return deployment


def deploy_one(deployment: "Deployment") -> None:
    """Deploy and wait until it serves; what user code did wrong becomes a text."""
    try:
        deployment.deploy()
    except (RuntimeError, ValueError, TypeError) as exc:
        raise Failure(f"Deployment {deployment.name!r}: {exc}") from exc


def wait_for_redis(url: str, timeout_s: float) -> None:
    """Until the server answers; at once an error where waiting does not help.

    Raises:
        ConfigurationError: It answers, but cannot be used.
        BrokerUnavailable: It did not answer in time.
    """
    from qserve.doctor import connect, require_usable
    from qserve.errors import BrokerUnavailable

    deadline = time.monotonic() + timeout_s
    told = False
    with connect(url) as redis:
        while True:
            try:
                return require_usable(redis)
            except BrokerUnavailable as exc:
                if time.monotonic() >= deadline:
                    raise
                if not told:
                    note(f"{exc} Waiting up to {timeout_s:.0f} s.")
                    told = True
            time.sleep(0.3)
