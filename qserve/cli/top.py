"""`qserve top`: what every deployment is doing now, live."""

import contextlib
import json
import time

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qserve.broker.instance.state import State
from qserve.cli.instance import connected
from qserve.cli.output import redis_url_option
from qserve.cli.status import COLORS, milliseconds
from qserve.operating.overview import OverviewRow, read_overview

_EVERY_S = 1.0
_BARS = " ▁▂▃▄▅▆▇█"


@click.command()
@redis_url_option
@click.option("--once", is_flag=True, help="Show it once and end; so where the output is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and end.")
def top(once: bool, as_json: bool) -> None:
    """Show the load of every deployment, again every second, until Ctrl-C.

    Rate and times are those of the last minute, the curve is that of the last ten.
    """
    console = Console()
    with contextlib.suppress(KeyboardInterrupt), connected() as state:
        if as_json:
            click.echo(json.dumps(read_overview(state, state.names())))
        elif once or not console.is_terminal:
            (console if console.is_terminal else Console(width=160)).print(_render(state))
        else:
            with Live(_render(state), console=console, auto_refresh=False, screen=True) as live:
                while True:
                    time.sleep(_EVERY_S)
                    live.update(_render(state), refresh=True)


def _render(state: State) -> RenderableType:
    rows = read_overview(state, state.names())
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("Deployment", overflow="fold")
    table.add_column("State")
    for title in ("Replicas", "Queued", "Running", "Oldest", "Calls/s", "Failed", "p50", "p99"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("Last 10 min", no_wrap=True)
    for row in sorted(rows, key=lambda row: (-row["rate"], -row["queued"], row["name"])):
        table.add_row(*_cells(row))
    if not rows:
        return Text("Nothing is deployed. Deploy something: qserve deploy MODULE")
    calls = sum(row["rate"] for row in rows)
    head = Text(f"{len(rows)} deployments   {calls:.1f} calls/s   {sum(row['queued'] for row in rows)} queued")
    return Group(head, table)


def _cells(row: OverviewRow) -> tuple[Text | str, ...]:
    state = "PAUSED" if row["paused"] else "ASLEEP" if row["asleep"] else row["state"]
    return (
        Text(row["name"], style="bold"),
        Text(state, style="yellow" if row["paused"] else COLORS.get(state, "")),
        f"{row['serving']}/{row['wanted']}",
        f"{row['queued']}/{row['limit']}",
        str(row["running"]),
        f"{row['oldest_s']:.1f} s" if row["oldest_s"] else "-",
        f"{row['rate']:.1f}",
        Text(str(row["failed"]), style="red" if row["failed"] else "dim"),
        milliseconds(row["p50_ms"]),
        milliseconds(row["p99_ms"]),
        _curve(row["spark"]),
    )


def _curve(counts: list[int]) -> str:
    thinned = [sum(counts[place : place + 3]) for place in range(0, len(counts), 3)]
    most = max(thinned, default=0)
    return "".join(_BARS[0 if not count else max(1, round(count / most * 8))] for count in thinned)
