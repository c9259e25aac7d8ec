"""`qserve top`: what every deployment is doing now, live."""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence

import click
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, Group, JustifyMethod, RenderableType
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
_AT_THE_LEFT = ("Deployment", "State", "Last 10 min")
_LEFT_OUT_FIRST = ("Last 10 min", "p50", "Running", "Oldest", "State", "p99", "Calls/s", "Failed")
"""In this order, where the terminal is narrow."""
_ENOUGH_OF_A_NAME = 12
_WITHOUT_TERMINAL = 160


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
            console = console if console.is_terminal else Console(width=_WITHOUT_TERMINAL)
            console.print(_render(state, console.width))
        else:
            with Live(_render(state, console.width), console=console, auto_refresh=False, screen=True) as live:
                while True:
                    time.sleep(_EVERY_S)
                    live.update(_render(state, console.width), refresh=True)


def _render(state: State, width: int) -> RenderableType:
    rows = read_overview(state, state.names())
    if not rows:
        return Text("Nothing is deployed. Deploy something: qserve deploy MODULE")
    cells = [_cells(row) for row in sorted(rows, key=lambda row: (-row["rate"], -row["queued"], row["name"]))]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    shown = _shown(cells, width)
    for title in shown:
        justify: JustifyMethod = "left" if title in _AT_THE_LEFT else "right"
        table.add_column(title, justify=justify, no_wrap=title != "Deployment", overflow="fold")
    for row in cells:
        table.add_row(*(row[title] for title in shown))
    calls = sum(row["rate"] for row in rows)
    head = Text(f"{len(rows)} deployments   {calls:.1f} calls/s   {sum(row['queued'] for row in rows)} queued")
    return Group(head, table)


def _shown(cells: Sequence[Mapping[str, Text | str]], width: int) -> list[str]:
    """The columns that a terminal has room for."""
    widths = {title: max(cell_len(title), *(cell_len(str(row[title])) for row in cells)) for title in cells[0]}
    widths["Deployment"] = min(widths["Deployment"], _ENOUGH_OF_A_NAME)
    for title in _LEFT_OUT_FIRST:
        if sum(widths.values()) + 3 * len(widths) <= width:
            break
        del widths[title]
    return list(widths)


def _cells(row: OverviewRow) -> dict[str, Text | str]:
    state = "PAUSED" if row["paused"] else "ASLEEP" if row["asleep"] else row["state"]
    return {
        "Deployment": Text(row["name"], style="bold"),
        "State": Text(state, style="yellow" if row["paused"] else COLORS.get(state, "")),
        "Replicas": f"{row['serving']}/{row['wanted']}",
        "Queued": f"{row['queued']}/{row['limit']}",
        "Running": str(row["running"]),
        "Oldest": f"{row['oldest_s']:.1f} s" if row["oldest_s"] else "-",
        "Calls/s": f"{row['rate']:.1f}",
        "Failed": Text(str(row["failed"]), style="red" if row["failed"] else "dim"),
        "p50": milliseconds(row["p50_ms"]),
        "p99": milliseconds(row["p99_ms"]),
        "Last 10 min": _curve(row["spark"]),
    }


def _curve(counts: list[int]) -> str:
    thinned = [sum(counts[place : place + 3]) for place in range(0, len(counts), 3)]
    most = max(thinned, default=0)
    return "".join(_BARS[0 if not count else max(1, round(count / most * 8))] for count in thinned)
