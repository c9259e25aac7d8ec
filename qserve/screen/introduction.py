"""What an instance says when it is up: what it serves, how to try it, how to stop it."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import qserve
from qserve.deployments.deployment import Deployment
from qserve.screen.samples import command_for
from qserve.settings import Settings

_MOST_LINES = 8
"""How many deployments are shown with a line each, so that the whole fits on a small screen."""


def introduction(
    deployments: Sequence[Deployment[Any]],
    url_of: Callable[[str], str | None],
    *,
    console: str = "",
    curl: str = "curl",
) -> list[str]:
    """The lines to print.

    Args:
        url_of: The URL of a route prefix; None where there is no HTTP.
        console: The URL of the console, "" if there is none.
        curl: How a request is made on a command line, with the options that every request needs.
    """
    rows, quiet = list[tuple[str, str]](), list[str]()
    for each in deployments:
        prefix = each.route_prefix
        url = None if prefix is None else url_of(prefix)
        shown = command_for(each, url, curl) or url
        if shown is None:
            quiet.append(each.name)
        else:
            rows.append((each.name, shown))
    more = len(rows) - _MOST_LINES
    if more > 1:
        rows = rows[:_MOST_LINES]
    width = max((len(name) for name, _ in [*rows, ("console", "")]), default=0)
    lines = [f"{_bold('qserve ' + qserve.__version__)} serves {_counted(len(deployments))}. Try:", ""]
    lines += [f"  {_bold(name.ljust(width))}  {shown}" for name, shown in rows]
    if more > 1:
        lines.append(f"  and {more} more: qserve status")
    if quiet:
        lines.append(f"  for handles only: {', '.join(quiet)}")
    lines.append("")
    if console:
        lines.append(f"  {_bold('console'.ljust(width))}  {console}")
    return lines


def curl_command(url: str, *, shows_certificate: bool = False) -> str:
    """`curl` with what every request to this instance needs: keys, and certificates.

    Args:
        shows_certificate: Clients have to show a certificate.
    """
    words = ["curl"]
    if url.startswith("https:"):
        words.append("-k")  # the name in the certificate is hardly that of the loopback
        if shows_certificate:
            words.append("--cert YOURS.pem")
    if Settings().api_keys or Settings().api_keys_file:
        words.append('-H "X-API-Key: $KEY"')
    return " ".join(words)


def _counted(number: int) -> str:
    return f"{number} deployment{'' if number == 1 else 's'}"


def _bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text
