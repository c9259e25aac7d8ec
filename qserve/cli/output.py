"""What all commands share: errors in one paragraph on stderr, options, the log."""

import logging
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

_TRACEBACK = "Traceback (most recent call last):"
_OWN_FRAME = re.compile(r'  File "[^"]*/(qserve_workers|concurrent/futures|asyncio)/[^"]+", line')

Command = TypeVar("Command", bound=Callable[..., Any])


class Failure(click.ClickException):
    """Ends a command with a text on stderr and exit code 1."""

    def show(self, file: Any = None) -> None:
        click.echo(click.style("Error: ", fg="red", bold=True) + self.message, err=True)


def redis_url_option(command: Command) -> Command:
    """`--redis-url`, handed on as QSERVE_REDIS_URL, which settings and child processes read and `ps` does not show."""

    def to_environment(_ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
        if value:
            os.environ["QSERVE_REDIS_URL"] = value

    return click.option(
        "--redis-url",
        metavar="URL",
        expose_value=False,
        callback=to_environment,
        help="redis://, rediss:// or unix:// URL of the instance's server. Default: QSERVE_REDIS_URL, "
        "else the instance running on this machine.",
    )(command)


def users_part(text: str) -> str:
    """Return a text without the frames of its tracebacks that only lead from a replica to the user's code."""
    kept: list[str] = []
    leading = skipping = False
    for line in text.strip().splitlines():
        if line == _TRACEBACK:
            leading, skipping = True, False
        elif leading and line.startswith('  File "'):
            leading = skipping = _OWN_FRAME.match(line) is not None
        elif not line.startswith("    "):
            if kept[-1:] == [_TRACEBACK]:  # nothing of the user's was on the way
                kept.pop()
            leading = skipping = False
        if not skipping:
            kept.append(line)
    return "\n".join(kept)


def note(text: str) -> None:
    """Print a line about what is going on to stderr; results go to stdout."""
    click.echo(text, err=True)


def log_to_stderr() -> None:
    """Show the warnings of the library; commands say by themselves what goes well."""
    logging.basicConfig(
        level=os.environ.get("QSERVE_LOG_LEVEL", "WARNING").upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
