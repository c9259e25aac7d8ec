"""`qserve schedule`: calls that are submitted again and again."""

import json
import shlex
import time
from collections.abc import Callable, Mapping
from typing import Any

import click

from qserve.broker.history.call_index import CallSummary
from qserve.cli.instance import connected
from qserve.cli.output import Failure, Seconds, json_option, note, redis_url_option, visible
from qserve.durable.cron import parse_when
from qserve.durable.schedules import Fired, Plan, Schedule, Schedules, next_moment
from qserve.errors import QServeError
from qserve.operating.call_search import known_calls
from qserve.operating.operators import user_of_this_machine, write_down
from qserve.tracebacks import gist
from qserve.wire.call_record import make_durable_options
from qserve.wire.codec import Codec
from qserve.wire.spec import pause_of

_MOST_OF_ERROR = 200


@click.group()
def schedule() -> None:
    """List, show, put, pause or remove schedules: durable calls that are submitted when their time comes."""


@schedule.command()
@redis_url_option
def ls() -> None:
    """List the schedules, with their last call and when the next one is due."""
    with connected() as state:
        schedules = Schedules(state)
        found, paused = list(schedules.all()), schedules.paused()
        records = known_calls(state, [fired.call_id for _, fired in found if fired is not None])
        for each, fired in found:
            called = f"{each.deployment}.{each.method}" if each.method else each.deployment
            following = _paused(paused[each.name]) if each.name in paused else _following(schedules, each)
            click.echo(f"{each.name}  {each.when}  {called}  {following}{_last(fired, records)}")
    if not found:
        note("There are no schedules.")


@schedule.command()
@redis_url_option
@click.argument("name")
def show(name: str) -> None:
    """Show the schedule NAME."""
    with connected() as state:
        schedules = Schedules(state)
        found = next(((each, fired) for each, fired in schedules.all() if each.name == name), None)
        if found is None:
            raise _unknown(name)
        each, fired = found
        last = fired and known_calls(state, [fired.call_id]).get(fired.call_id)
        due = next_moment(each, schedules.now())
        facts: dict[str, Any] = {
            "name": each.name,
            "when": each.when,
            "deployment": each.deployment,
            "method": each.method or "__call__",
            **_arguments(each),
            "retries": each.terms.retries,
            "expires": each.expires_s,
            "paused": schedules.paused().get(each.name),
            "next": _when(due) if due is not None else None,
            "last": _when(fired.at / 1000) if fired is not None else None,
            "call": fired.call_id if fired is not None and not fired.error else None,
            "state": last.state if last else None,
            "error": (fired.error if fired is not None else "") or (last.error if last else "") or None,
        }
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False))


@schedule.command()
@redis_url_option
@click.option("--method", default="", help="The method to call instead of __call__.")
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=0,
    help="How often a call may run again after it has raised an error.",
)
@click.option("--expires", type=Seconds(0.001), help="Seconds after which a call is not started any more.")
@click.argument("name")
@click.argument("when")
@click.argument("deployment")
@click.argument("args", nargs=-1, metavar="[JSON]...")
def put(
    name: str, when: str, deployment: str, args: tuple[str, ...], method: str, retries: int, expires: float | None
) -> None:
    """Call DEPLOYMENT with these arguments WHEN they are due: "0 3 * * *", "0 3 * * * Europe/Berlin", "every 30s"."""
    arguments = tuple(map(_argument, args))
    with connected() as state:
        try:
            options = make_durable_options(retries=retries, expires=expires)
            plan = Plan(name, when, deployment, method, options, arguments, {})
            schedules = Schedules(state)
            made = schedules.put(plan, Codec(allow_pickle=False, max_bytes=1 << 24))
        except ValueError as exc:
            raise Failure(f"{exc}") from exc
        write_down(state, "put schedule", name, f"{made.when}: {deployment}")
        note(f"{name}: {_following(schedules, made)}")


@schedule.command()
@redis_url_option
@click.argument("name")
def rm(name: str) -> None:
    """Remove the schedule NAME; calls that it has submitted go on."""
    _change(name, "remove schedule", lambda schedules: schedules.remove(name))
    note(f"{name}: removed")


@schedule.command()
@redis_url_option
@json_option
@click.argument("name")
def pause(name: str, as_json: bool) -> None:
    """Let the schedule NAME submit nothing until `qserve schedule resume NAME`; what is due meanwhile is left out."""
    _change(name, "pause schedule", lambda schedules: schedules.pause(name, user_of_this_machine()))
    _print_json(as_json, name, paused=True)
    note(f"{name}: paused. `qserve schedule resume {name}` lets it go on.")


@schedule.command()
@redis_url_option
@json_option
@click.argument("name")
def resume(name: str, as_json: bool) -> None:
    """Let the schedule NAME submit calls again, from its next moment on."""
    _change(name, "resume schedule", lambda schedules: schedules.pause(name, ""))
    _print_json(as_json, name, paused=False)
    note(f"{name}: submits calls again")


def _change(name: str, action: str, change: Callable[[Schedules], bool]) -> None:
    with connected() as state:
        if not change(Schedules(state)):
            raise _unknown(name)
        write_down(state, action, name)


def _print_json(wanted: bool, name: str, *, paused: bool) -> None:
    if wanted:
        click.echo(json.dumps({"schedule": name, "paused": paused}))


def _argument(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise click.UsageError(
            f"The argument {text[:40]!r} is no JSON ({exc}). A text stands in double quotes; the shell must leave them "
            f"in place: {shlex.quote(json.dumps(text[:40], ensure_ascii=False))}"
        ) from exc


def _following(schedules: Schedules, each: Schedule) -> str:
    try:
        return f"next {_when(parse_when(each.when).next_after(schedules.now()))}"
    except ValueError as exc:  # a time zone that is not known here, but perhaps where schedules are submitted
        return f"next unknown ({exc})"


def _unknown(name: str) -> Failure:
    return Failure(f"There is no schedule {name!r}; `qserve schedule ls` lists them.")


def _paused(paused: str) -> str:
    since, who = pause_of(paused)
    return f"paused{f' since {_when(since)}' if since else ''} by {who}"


def _when(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _last(fired: Fired | None, records: Mapping[str, CallSummary]) -> str:
    if fired is None:
        return ""
    record = records.get(fired.call_id)
    state = f" {record.state}" if record else ""
    error = f": {visible(gist(record.error))[:_MOST_OF_ERROR]}" if record and record.error else ""
    return f"  last {_when(fired.at / 1000)} {fired.error or fired.call_id}{state}{error}"


def _arguments(each: Schedule) -> dict[str, Any]:
    try:
        args, kwargs = Codec(allow_pickle=False, max_bytes=1 << 40).unpack_call(each.payload)
    except QServeError as exc:  # a pickle
        return {"args": str(exc)}
    return {"args": [repr(each) for each in args], "kwargs": {key: repr(value) for key, value in kwargs.items()}}
