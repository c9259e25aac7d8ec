"""The `qserve` command: one module per group of commands, `main` joins them."""

import click

from qserve.cli.call import call
from qserve.cli.deploy import delete, deploy, shutdown
from qserve.cli.doctor import doctor
from qserve.cli.output import Group
from qserve.cli.run import run
from qserve.cli.start import start
from qserve.cli.status import status


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qserve")
def main() -> None:
    """Serve Python classes and functions from queues.

    `qserve run MODULE` is all it takes on one machine. Everywhere else, `qserve start` runs this machine's share of an
    instance and `qserve deploy` tells the instance what to serve.
    """


for command in (run, start, deploy, status, call, delete, shutdown, doctor):
    main.add_command(command)
