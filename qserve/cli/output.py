"""What all commands share: errors in one paragraph on stderr, options, the log."""

import math
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from qserve.telemetry import log_records

_CONTROL = re.compile(r"\x1b(?!\[[\d;]*m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f]").sub

if TYPE_CHECKING:
    from qserve.settings import Settings

_MOST_S = 1e9

Command = TypeVar("Command", bound=Callable[..., Any])


class Seconds(click.FloatRange):
    """The type of options that are numbers of seconds, which clocks can count."""

    name = "seconds"

    def __init__(self, least: float = 0.0) -> None:
        super().__init__(min=least, max=_MOST_S, max_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found: float = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return found


class Failure(click.ClickException):
    """Ends a command with a text on stderr and exit code 1."""

    def show(self, file: Any = None) -> None:
        click.echo(click.style("Error: ", fg="red", bold=True) + self.message, err=True)


json_option: Final = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


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


def visible(text: str) -> str:
    """What others wrote, for a terminal: colors stay, and other control characters are shown instead of obeyed."""
    return _CONTROL(lambda found: "\\r" if found[0] == "\r" else f"\\x{ord(found[0]):02x}", text)


def note(text: str) -> None:
    """Print a line about what is going on to stderr; results go to stdout."""
    click.echo(text, err=True)


def log_to_stderr(settings: "Settings") -> None:
    """Show the warnings of the library; commands say by themselves what goes well."""
    level = settings.log_level if "log_level" in settings.model_fields_set else "WARNING"
    log_records.log_to_stderr("command", level, settings.log_format)
