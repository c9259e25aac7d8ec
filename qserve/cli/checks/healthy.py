"""`qserve healthy`: whether the processes of this machine make progress."""

import os

import click

from qserve.cli.output import Failure
from qserve.deployments.alive_files import judge


@click.command()
def healthy() -> None:
    """Check that the node and the workers of this machine make progress; exit code 1 if not.

    It asks nobody, Redis neither: for the health checks of containers and supervisors. It knows the processes of this
    user, with the same QSERVE_RUNTIME_DIR and QSERVE_NAMESPACE.
    """
    well, ill = judge(os.environ.get("QSERVE_NAMESPACE", "").strip() or "default")  # the settings take longer to import
    for line in well:
        click.echo(line)
    if ill:
        raise Failure("\n".join(ill))
