"""Options of commands that start gateways."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--gateway-workers",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Gateway processes that share the port.",
    ),
    click.option("--ssl-certfile", metavar="FILE", help="Certificate chain. With it, the gateway serves HTTPS."),
    click.option("--ssl-keyfile", metavar="FILE", help="The key of the certificate, if it is not in the same file."),
    click.option(
        "--ssl-ca-certs", metavar="FILE", help="Clients have to show a certificate of one of these authorities."
    ),
)


def gateway_options(command: Command) -> Command:
    """`--gateway-workers` and the options of TLS, which `gateway_arguments` takes as keywords."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def gateway_arguments(**options: str | None) -> tuple[str, ...]:
    """The options of TLS as a gateway's command line has them."""
    return tuple(f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None)
