"""`qserve status`: what should run, what runs, and how it fares."""

import contextlib
import json
import time
from collections.abc import Callable
from functools import partial
from typing import TypedDict

import click
from msgspec.structs import asdict
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qserve.applications.application_goal import deployments_of
from qserve.broker.counters import VALUES
from qserve.broker.instance.state import State
from qserve.cli.call import unknown_deployment
from qserve.cli.instance import connected
from qserve.cli.output import Failure, redis_url_option, visible
from qserve.deployments.deploying import condition, live_workers
from qserve.wire.spec import WAITING, Deployed, GatewayInfo, NodeInfo, ReplicaInfo, pause_of

COLORS = {"HEALTHY": "green", "SERVING": "green", "DEPLOY_FAILED": "red", "WAITING": "yellow", "DEPLOYING": "yellow"}
_WATCH_S = 1.0
_PLAIN_WIDTH = 160
"""Columns of the table where the output is no terminal; it takes only as many as it needs."""


class ReplicaStatus(TypedDict):
    """One replica in `status --json`."""

    tag: str
    host: str
    pid: int
    node: str
    state: str
    generation: int
    running: int
    handled: int
    p50_ms: float | None
    p99_ms: float | None
    problem: str
    gpus: str


class DeploymentRow(TypedDict):
    """One deployment in `status --json`; `error` is empty unless a version or a replica could not be brought up."""

    name: str
    route: str | None
    state: str
    error: str
    paused: bool
    paused_since: float | None
    paused_by: str
    version: str | None
    generation: int
    queued: int
    running: int
    p50_ms: float | None
    p99_ms: float | None
    replicas: list[ReplicaStatus]
    wanted: int
    asleep: bool
    autoscaling_config: dict[str, float | None] | None


class ProcessStatus(TypedDict):
    """A node or gateway in `status --json`; `url` is empty for a node, and `drained` false for a gateway."""

    id: str
    host: str
    pid: int
    url: str
    drained: bool


class InstanceStatus(TypedDict):
    """What `status --json` prints; `large_values` counts them by the way that they have gone."""

    namespace: str
    large_values: dict[str, int]
    gateways: list[ProcessStatus]
    nodes: list[ProcessStatus]
    deployments: list[DeploymentRow]


@click.command()
@redis_url_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
@click.option("--watch", is_flag=True, help="Show it again every second, until Ctrl-C.")
@click.argument("name", required=False)
def status(name: str | None, as_json: bool, watch: bool) -> None:
    """Show deployments, their replicas and queues; of NAME only, which is an application or a deployment."""
    ending = contextlib.suppress(KeyboardInterrupt) if watch else contextlib.nullcontext()
    with ending, connected() as state:
        known = state.list()
        if name is not None and name not in known and not deployments_of(state, name):
            raise Failure(unknown_deployment(name, known))
        read = partial(read_status, state, name)
        if as_json:
            _print_json(read, watch=watch)
        else:
            _print_tables(read, watch=watch)


def read_status(state: State, name: str | None = None) -> InstanceStatus:
    """The status of an instance, as `--json` prints it.

    Args:
        name: Of this application or deployment only.
    """
    counters = state.observed.counters()
    return {
        "namespace": state.keys.namespace,
        "large_values": {way: counters.get(counter, 0) for counter, way in VALUES.items()},
        "gateways": [_process(info, info.url) for info in state.observed.gateways().values()],
        "nodes": [_process(info) for info in state.observed.nodes().values()],
        "deployments": [
            _deployment(state, deployed)
            for deployed in state.list().values()
            if name in (None, deployed.spec.name, deployed.spec.application)
        ],
    }


def _process(info: NodeInfo | GatewayInfo, url: str = "") -> ProcessStatus:
    drained = isinstance(info, NodeInfo) and bool(info.drained)
    return {"id": info.id, "host": info.host, "pid": info.pid, "url": url, "drained": drained}


def _deployment(state: State, deployed: Deployed) -> DeploymentRow:
    spec, workers = deployed.spec, live_workers(state, deployed.spec.name)
    replicas = [_replica(info) for info in state.observed.replicas(spec.name).values()]
    replicas.sort(key=lambda replica: (replica["host"], replica["pid"]))
    running = sum(replica["running"] for replica in replicas)
    since, who = pause_of(deployed.paused) if deployed.paused else (None, "")
    condition_now, error = condition(deployed, workers)
    nobody = not replicas and all(
        node.drained for node in state.observed.nodes().values()
    )  # what was reached earlier went with the last node
    return {
        "name": spec.name,
        "route": spec.route_prefix,
        "state": WAITING if nobody else condition_now,
        "error": error,
        "paused": bool(deployed.paused),
        "paused_since": since,
        "paused_by": who,
        "version": spec.version,
        "generation": deployed.generation,
        "queued": max(0, state.observed.queued(spec.name) - running),
        "running": running,
        "p50_ms": _slowest([replica["p50_ms"] for replica in replicas]),
        "p99_ms": _slowest([replica["p99_ms"] for replica in replicas]),
        "replicas": replicas,
        "wanted": sum(worker.wanted for worker in workers),
        "asleep": deployed.asleep,
        "autoscaling_config": None if spec.autoscaling is None else asdict(spec.autoscaling),
    }


def _replica(info: ReplicaInfo) -> ReplicaStatus:
    return {
        "tag": info.tag,
        "host": info.host,
        "pid": info.pid,
        "node": info.node,
        "state": info.state,
        "generation": info.generation,
        "running": info.running,
        "handled": info.handled,
        "p50_ms": info.p50_ms,
        "p99_ms": info.p99_ms,
        "problem": info.problem,
        "gpus": info.gpus,
    }


def _slowest(times: list[float | None]) -> float | None:
    # Percentiles of several replicas do not add up; the worst one is what somebody experiences.
    return max((value for value in times if value is not None), default=None)


def _print_json(read: Callable[[], InstanceStatus], *, watch: bool) -> None:
    click.echo(json.dumps(read(), indent=None if watch else 2))
    while watch:
        time.sleep(_WATCH_S)
        click.echo(json.dumps(read()))


def _print_tables(read: Callable[[], InstanceStatus], *, watch: bool) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)
    if not (watch and console.is_terminal):
        console.print(render(read()))
        while watch:
            time.sleep(_WATCH_S)
            console.print(render(read()))
        return
    with Live(render(read()), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(_WATCH_S)
            live.update(render(read()), refresh=True)


def render(found: InstanceStatus) -> RenderableType:
    """The status as it is shown to people."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("Deployment", "Route", "State", "Replicas"):
        table.add_column(title, overflow="fold")
    for title in ("Queued", "Running", "p50", "p99"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in found["deployments"]:
        table.add_row(
            Text(row["name"], style="bold"),
            row["route"] or "-",
            _state(row),
            _replicas(row),
            str(row["queued"]),
            str(row["running"]),
            milliseconds(row["p50_ms"]),
            milliseconds(row["p99_ms"]),
        )
    urls = ", ".join(gateway["url"] for gateway in found["gateways"]) or "no gateway"
    hosts = ", ".join(
        f"{node['host']} (pid {node['pid']}{', drained' if node['drained'] else ''})" for node in found["nodes"]
    )
    hosts = hosts or "no node: nothing can run"
    lines = [Text(f"Namespace {found['namespace']}   HTTP: {urls}   Nodes: {hosts}")]
    if any(found["large_values"].values()):
        ways = ", ".join(f"{count:,} {way.replace('_', ' ')}" for way, count in found["large_values"].items())
        lines.append(Text(f"Large values: {ways}"))
    if not found["deployments"]:
        lines.append(Text("\nNothing is deployed. Deploy something: qserve deploy MODULE"))
        return Group(*lines)
    errors = [
        Text(visible(f"{row['name']}: {row['error'].strip()}\n"), style="red")
        for row in found["deployments"]
        if row["error"]
    ]
    errors += [
        Text(visible(f"{row['name']}, pid {replica['pid']}: {replica['problem']}\n"), style="red")
        for row in found["deployments"]
        for replica in row["replicas"]
        if replica["problem"]
    ]
    return Group(*lines, table, *errors)


def _state(row: DeploymentRow) -> Text:
    text = Text(row["state"], style=COLORS.get(row["state"], ""))
    if row["paused"]:
        since = (
            time.strftime(" since %Y-%m-%d %H:%M", time.localtime(row["paused_since"])) if row["paused_since"] else ""
        )
        text.append(f"\nPAUSED{since} by {row['paused_by']}", style="yellow")
    return text


def _replicas(row: DeploymentRow) -> Text:
    lines = [_replica_line(replica) for replica in row["replicas"]]
    if row["asleep"]:
        return Text("\n").join([*lines, Text("asleep (0 replicas; a call wakes it)", style="dim")])
    if (scaling := row["autoscaling_config"]) is not None:
        bounds = f"{scaling['min_replicas']} to {scaling['max_replicas']}"
        lines.append(Text(f"{row['wanted']} wanted, of {bounds}", style="dim"))
    return Text("\n").join(lines) or Text("none", style="dim")


def _replica_line(replica: ReplicaStatus) -> Text:
    gpus = f", GPU {replica['gpus']}" if replica["gpus"] else ""
    line = Text(f"pid {replica['pid']} on {replica['host']}{gpus}")
    if replica["state"] != "SERVING":
        state, is_bad = replica["state"], bool(replica["problem"])
        line.append(f" ({state if is_bad else state.lower()})", style="red" if is_bad else "yellow")
    return line


def milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f} ms" if value < 100 else f"{value / 1000:.2f} s"
