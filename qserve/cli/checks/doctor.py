"""`qserve doctor`: whether the Redis server is fit for qserve."""

import click

from qserve.broker.server.redis_checks import FAIL, WARN, check_server, connect
from qserve.cli.output import redis_url_option
from qserve.deployments.local_instance import find_settings

_MARKS = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}


@click.command()
@redis_url_option
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Check the Redis server for everything that would lose or delay calls.

    The exit code is 1 if something has to be changed before qserve can use the server.
    """
    with connect(find_settings().redis_url) as redis:
        findings = check_server(redis)
    for finding in findings:
        mark, color = _MARKS[finding.level]
        click.echo(f"{click.style(mark, fg=color)}  {finding.check:<12} {finding.text}")
        if finding.advice:
            click.echo(f"{'':<18} -> {finding.advice}")
    levels = [finding.level for finding in findings]
    click.echo(f"\n{levels.count(FAIL)} to fix, {levels.count(WARN)} to look at.")
    ctx.exit(1 if FAIL in levels else 0)
