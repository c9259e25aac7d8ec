"""`qserve pause`, `resume`, `scale`, `rollback` and `drain`: changes of an instance that need no code."""

import json
import time
from typing import Any

import click

from qserve.broker.instance.state import State
from qserve.cli.instance import connected
from qserve.cli.output import Failure, Seconds, json_option, note, redis_url_option
from qserve.deployments import deploying
from qserve.operating import controls, nodes
from qserve.operating.operators import user_of_this_machine, write_down

_POLL_S = 0.1


@click.command()
@redis_url_option
@json_option
@click.argument("name")
def pause(name: str, as_json: bool) -> None:
    """Let calls of the deployment NAME be accepted, but not run, until `qserve resume NAME`.

    Calls that run already end as they would. Those that wait do so up to their deadlines; durable calls wait on.
    """
    with connected() as state:
        controls.pause(state, name, user_of_this_machine())
        _done(state, name, "pause", as_json, paused=True)
    note(f"{name} is paused: calls are accepted and wait. `qserve resume {name}` lets them run.")


@click.command()
@redis_url_option
@json_option
@click.argument("name")
def resume(name: str, as_json: bool) -> None:
    """Let calls of the deployment NAME run again."""
    with connected() as state:
        controls.resume(state, name)
        _done(state, name, "resume", as_json, paused=False)
    note(f"{name} runs its calls.")


@click.command()
@redis_url_option
@json_option
@click.option("--timeout", type=Seconds(), default=60.0, show_default=True, help="Seconds to wait for it.")
@click.option("--min", "least", type=click.IntRange(min=0), help="Never fewer, where the number follows the load.")
@click.option("--max", "most", type=click.IntRange(min=1), help="Never more, where the number follows the load.")
@click.argument("name")
@click.argument("replicas", type=click.IntRange(min=1), required=False)
def scale(name: str, replicas: int | None, least: int | None, most: int | None, timeout: float, as_json: bool) -> None:
    """Give the deployment NAME another number of REPLICAS, or another range of it, until it is deployed again.

    Nodes that were started with `qserve start` keep to their --replicas-per-node. Where all nodes do, nothing changes.
    """
    if replicas is None:
        if least is None and most is None:
            raise click.UsageError("Give the number of replicas, or --min and --max where it follows the load.")
        _scale_between(name, least, most, as_json)
        return
    if least is not None or most is not None:
        raise click.UsageError("Give either the number of replicas, or --min and --max.")
    with connected() as state:
        try:
            goal = controls.scale(state, name, replicas)
        except ValueError as exc:
            raise Failure(f"{exc}.") from exc
        if goal is not None and not goal.wait(timeout):
            raise Failure(
                f"{name} does not have {replicas} replicas after {timeout:g} s: `qserve status` shows how far."
            )
        total = deploying.wanted(state, name)
        _done(state, name, f"scale to {replicas}", as_json, replicas=replicas)
    if total == replicas:
        note(f"{name} has {replicas} replicas{'' if goal is not None else ' already'}.")
    elif total:
        note(f"{name} has {total} replicas in all: nodes of `qserve start` keep to their --replicas-per-node.")
    else:
        note(f"{name} is to have {replicas} replicas. Nothing runs it at the moment.")


def _scale_between(name: str, least: int | None, most: int | None, as_json: bool) -> None:
    with connected() as state:
        try:
            bounds = controls.scale_between(state, name, least, most)
        except ValueError as exc:
            raise Failure(f"{exc}.") from exc
        facts: dict[str, Any] = {"min_replicas": bounds.min_replicas, "max_replicas": bounds.max_replicas}
        _done(state, name, f"scale from {bounds.min_replicas} to {bounds.max_replicas}", as_json, **facts)
    note(f"{name} has from {bounds.min_replicas} to {bounds.max_replicas} replicas, as the load asks for.")


@click.command()
@redis_url_option
@json_option
@click.option("--timeout", type=Seconds(), default=120.0, show_default=True, help="Seconds to wait.")
@click.argument("name")
def rollback(name: str, timeout: float, as_json: bool) -> None:
    """Deploy the version of NAME again that was served before the present one; done twice, it leads back.

    Its options and arguments come back, and code that was pickled. Replicas import other code from the files that are
    on their machines: if these have changed since on this one, nothing is done.
    """
    with connected() as state:
        try:
            goal, caveat = controls.roll_back(state, name)
        except ValueError as exc:
            raise Failure(f"{exc}.") from exc
        if not goal.wait(timeout):
            raise Failure(f"The former version of {name} is not up after {timeout:g} s: `qserve status` shows how far.")
        version = goal.deployed.spec.version
        facts: dict[str, Any] = {"version": version, "generation": goal.deployed.generation, "caveat": caveat}
        _done(state, name, "roll back", as_json, **facts)
    shown = f"version {version}" if version else "its former version"
    note(f"{name} is deployed again as {shown} was. {caveat}" if caveat else f"{name} serves {shown} again.")


@click.command()
@redis_url_option
@json_option
@click.option("--undo", is_flag=True, help="Let it run what is deployed again.")
@click.option(
    "--timeout",
    type=Seconds(),
    default=60.0,
    show_default=True,
    help="Seconds to wait until it runs nothing.",
)
@click.argument("node")
def drain(node: str, undo: bool, timeout: float, as_json: bool) -> None:
    """Let the replicas on NODE finish their calls and leave, and start none there until `qserve drain NODE --undo`.

    NODE is a host as `qserve status` shows it, or HOST:PID where several nodes run on one. Calls that wait are run on
    other nodes. A node that is started again is not drained any more.
    """
    with connected() as state:
        try:
            found = nodes.find_node(state, node)
        except ValueError as exc:
            raise Failure(f"{exc}.") from exc
        if undo:
            nodes.undrain(state, found)
            _done(state, node, "undrain", as_json, key="node", drained=False)
            note(f"{node} runs what is deployed again.")
            return
        waiting = nodes.served_nowhere_else(state, found)
        if waiting:
            note(f"No other node serves {', '.join(waiting)}: calls wait.")
        nodes.drain(state, found, user_of_this_machine())
        _done(state, node, "drain", as_json, key="node", drained=True)
        until = time.monotonic() + timeout
        while (left := nodes.replicas_on(state, found)) and time.monotonic() < until:
            time.sleep(_POLL_S)
    if left:
        raise Failure(
            f"{left} replicas on {node} have not finished their calls after {timeout:g} s. They end when they have."
        )
    note(f"{node} runs nothing now. `qserve drain {node} --undo` lets it.")


def _done(state: State, name: str, action: str, as_json: bool, *, key: str = "deployment", **facts: object) -> None:
    write_down(state, action, name)
    if as_json:
        click.echo(json.dumps({key: name} | facts))
