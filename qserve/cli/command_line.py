"""The `qserve` command: one module per group of commands, imported when one of them is asked for."""

import difflib
import importlib
import signal
import sys
from pathlib import Path
from typing import Any

import click

from qserve.cli.output import Failure
from qserve.cli.project.lookup import load_env_file
from qserve.deployments.head_start import HeadStart
from qserve.errors import QServeError
from qserve.this_machine import machine_errors

COMMANDS = {
    "run": ("qserve.cli.run", "Serve a module or a config file from this machine, until Ctrl-C."),
    "dev": ("qserve.cli.run", "Serve a module while you work on it: reload, and tracebacks in HTTP bodies."),
    "init": ("qserve.cli.project.init", "Write a small project that runs and has a test."),
    "start": ("qserve.cli.start", "Run this machine's share of an instance, until Ctrl-C."),
    "deploy": ("qserve.cli.deploy", "Deploy a module or a config file into a running instance."),
    "build": ("qserve.cli.config.commands", "Write a config file of applications."),
    "config": ("qserve.cli.config.commands", "Print what was deployed from a config file, as a config file."),
    "schema": ("qserve.cli.config.commands", "Write the JSON schema of config files, for editors."),
    "status": ("qserve.cli.status", "Show deployments, their replicas and queues."),
    "call": ("qserve.cli.call", "Call a deployment and print what it returns."),
    "calls": ("qserve.cli.calls", "List, show, cancel or run again durable calls; list calls that had trouble."),
    "top": ("qserve.cli.top", "Show the load of every deployment, live."),
    "logs": ("qserve.cli.logs", "Show the log of the instance on this machine."),
    "pause": ("qserve.cli.steering", "Let calls of a deployment be accepted, but not run."),
    "resume": ("qserve.cli.steering", "Let calls of a paused deployment run again."),
    "scale": ("qserve.cli.steering", "Give a deployment another number of replicas."),
    "rollback": ("qserve.cli.steering", "Deploy the former version of a deployment again."),
    "drain": ("qserve.cli.steering", "Let a node run nothing, so that its machine can be worked on."),
    "dead": ("qserve.cli.dead", "List, show, send again or drop calls that were given up on."),
    "schedule": ("qserve.cli.schedule", "List, show, put, pause or remove calls that are submitted on a schedule."),
    "delete": ("qserve.cli.deploy", "Stop serving an application or a deployment."),
    "shutdown": ("qserve.cli.deploy", "Delete all deployments and stop the local instance."),
    "healthy": ("qserve.cli.checks.healthy", "Check that the processes of this machine make progress."),
    "doctor": ("qserve.cli.checks.doctor", "Check the Redis server for what would lose or delay calls."),
    "redis-acl": ("qserve.cli.checks.redis_acl", "Print Redis users with the least rights that processes need."),
}
"""Command -> (its module, what `--help` says), so that `--help` need not import the whole library."""

_STARTS_INSTANCE = ("run", "dev")
"""Commands with which an instance begins to start before they are imported."""
_HELP = frozenset({"-h", "--help"})
_INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, as shells have it."""


class Commands(click.Group):
    """Loads a command on demand, and ends it with one paragraph and exit code 1 where the user can do something."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name.replace("-", "_"))
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest a command whose name is close to one that there is not."""
        if args[0] in _STARTS_INSTANCE and _HELP.isdisjoint(args) and not ctx.resilient_parsing:
            ctx.obj = HeadStart()
            ctx.call_on_close(ctx.obj.cancel)
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as exc:
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if close:
                hint = f" Did you mean {close[0]!r}?"
            elif args[0].endswith(".py") or args[0] in ("serve", "up"):
                hint = " An application is served with `qserve run`."
            else:
                raise
            raise click.UsageError(f"{exc.message}{hint}", ctx) from exc

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with machine_errors():
                return super().invoke(ctx)
        except QServeError as exc:
            raise Failure(str(exc)) from exc
        except KeyboardInterrupt:
            sys.exit(_INTERRUPTED)


def _load_env_file(ctx: click.Context, _option: click.Parameter, path: Path) -> None:
    if not ctx.resilient_parsing:
        load_env_file(path)


@click.group(cls=Commands, context_settings={"help_option_names": sorted(_HELP)})
@click.version_option(package_name="qserve")
@click.option(
    "--env-file",
    type=click.Path(path_type=Path),
    default=".env",
    show_default=True,
    is_eager=True,  # before anything is started
    expose_value=False,
    callback=_load_env_file,
    help="File with environment variables, for those that are not set.",
)
def main() -> None:
    """Serve Python classes and functions from queues.

    `qserve run MODULE` is all it takes on one machine. Everywhere else, `qserve start` runs this machine's share of an
    instance and `qserve deploy` tells the instance what to serve.
    """
    # A shell that runs scripts lets its background jobs ignore SIGINT; `kill -INT` means this process all the same.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
