"""`qserve calls`: durable calls, found by what is known of them."""

import json
import time
from typing import Any

import click

from qserve.broker.history.call_index import STATES, CallSummary
from qserve.broker.history.troubles import Trouble, read_troubles
from qserve.broker.instance.state import State
from qserve.cli.call import none_found
from qserve.cli.instance import connected
from qserve.cli.output import Failure, note, redis_url_option, visible
from qserve.deployments.local_instance import find_settings
from qserve.errors import BrokerUnavailable, ConfigurationError, QServeError
from qserve.operating import controls
from qserve.operating.call_contents import contents_of
from qserve.operating.call_search import CallFilter, find_call, find_calls
from qserve.operating.call_tree import Relative, family_of
from qserve.operating.operators import write_down
from qserve.tracebacks import gist

_NONE = "There are no such calls."
_OF_REPLICAS = ("died", "stacks")
"""Troubles that are those of no call."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@click.group()
def calls() -> None:
    """List, show, cancel or run again durable calls; list ordinary calls that had trouble.

    A durable call is found while it waits or runs, and after its end for as long as its record is kept.
    """


@calls.command()
@redis_url_option
@click.option(
    "--state", "states", multiple=True, type=click.Choice(STATES), help="Only calls in this state; repeatable."
)
@click.option("--method", default="", help="Only calls of this method.")
@click.option("--error", default="", metavar="TEXT", help="Only calls whose last error contains this.")
@click.option("--key", default="", help="Only calls with this Idempotency-Key.")
@click.option(
    "--since", default="", metavar="AGE", help="Only calls that entered their state within 30s, 5m, 2h or 3d."
)
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many.")
@click.option("--troubled", is_flag=True, help="Ordinary calls that failed, were refused or took long, instead.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each, a line each.")
@click.argument("name", required=False)
def ls(
    name: str | None,
    states: tuple[str, ...],
    method: str,
    error: str,
    key: str,
    since: str,
    limit: int,
    troubled: bool,
    as_json: bool,
) -> None:
    """List calls of the deployment NAME, or of all, the newest first."""
    if troubled and (states or key):
        raise click.UsageError("Ordinary calls have no state and no key: --troubled takes neither --state nor --key.")
    wanted = CallFilter(states, name or "", method, error, key, time.time() - age_of(since) if since else 0.0)
    with connected() as state:
        if troubled:
            _list_troubles(state, wanted, limit, as_json)
            return
        found = find_calls(state, wanted, limit)
        none = "" if found.calls else none_found(_NONE, [name] if name else [], state)
    for _, call in found.calls:
        click.echo(json.dumps(facts_of(call)) if as_json else visible(_line(call)))
    if not found.calls:
        note(none if not found.is_cut else "None among the last 2,000 calls: narrow the search.")
    elif found.next_before is not None:
        note(f"There are more: --limit {limit * 2}, or narrow the search.")


@calls.command()
@redis_url_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.argument("call")
def show(call: str, as_json: bool) -> None:
    """Show one call, with its arguments and its result as far as they are kept."""
    with connected() as state:
        found = find_call(state, call)
        contents, family = contents_of(state, found), family_of(state, found)
    facts = facts_of(found) | {"key": found.key or None, "made_by": found.parent or None}
    facts |= {
        "arguments": contents.arguments,
        "result": contents.result,
        "given": found.parts or None,
        "parts": contents.parts,
    }
    if as_json:
        facts |= {"traceback": contents.error or None, "family": [_relative(each) for each in family]}
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    for key, value in facts.items():
        if value not in (None, "", []):
            click.echo(visible(f"{key:<11}{_moment(value) if key in _MOMENTS else _shown(value)}"))
    for each in family:
        click.echo(visible(_branch(each, found.id)))
    if contents.error:
        click.echo(visible(f"\n{contents.error.strip()}"))


@calls.command()
@redis_url_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each, a line each.")
@click.argument("ids", nargs=-1, required=True, metavar="CALL...")
def cancel(ids: tuple[str, ...], as_json: bool) -> None:
    """Cancel calls. One that waits never runs; one that runs is stopped if it is asynchronous."""
    with connected() as state:
        _each(state, ids, as_json, "cancel", controls.cancel)


@calls.command()
@redis_url_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each, a line each.")
@click.option("--all", "every", is_flag=True, help="All failed and dead calls of the deployment that is named instead.")
@click.argument("ids", nargs=-1, required=True, metavar="CALL... | NAME")
def retry(ids: tuple[str, ...], as_json: bool, every: bool) -> None:
    """Run calls again that have failed or are dead letters, under their own ids."""
    limit = find_settings().out_of_line_bytes
    with connected() as state:
        if every:
            names, ids = ids, tuple(call.id for name in ids for call in controls.failed_calls(state, name))
            if not ids:
                note(none_found(_NONE, names, state))
                return
        _each(state, ids, as_json, "retry", lambda state, call: controls.send_again(state, call, limit) and "queued")


def facts_of(call: CallSummary) -> dict[str, Any]:
    """What a list says of a call, in JSON types; times are Unix times."""
    return {
        "id": call.id,
        "state": call.state,
        "deployment": call.deployment,
        "method": call.method or "__call__",
        "attempts": call.attempts,
        "submitted": call.submitted,
        "started": call.started,
        "ended": call.ended,
        "due": call.due,
        "error": call.error or None,
    }


def age_of(text: str) -> float:
    """Seconds of an age such as 30s, 5m, 2h or 3d; raises a usage error for anything else."""
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS or not number.replace(".", "", 1).isdecimal():
        raise click.UsageError(f"{text!r} is no age: write 30s, 5m, 2h or 3d.")
    return float(number) * _UNITS[unit]


_MOMENTS = {"submitted", "started", "ended", "due"}


def _each(state: State, ids: tuple[str, ...], as_json: bool, action: str, act: Any) -> None:
    failed = 0
    for call_id in ids:
        try:
            said = act(state, find_call(state, call_id))
            write_down(state, action, call_id, said)
        except (BrokerUnavailable, ConfigurationError):
            raise  # as all that follow would, each after its time
        except QServeError as exc:
            if len(ids) == 1:
                raise
            said, failed = str(exc), failed + 1
        click.echo(json.dumps({"id": call_id, "outcome": said}) if as_json else f"{call_id}: {said}")
    if failed:
        raise Failure(f"{failed} of {len(ids)} calls were left as they are.")


def _line(call: CallSummary) -> str:
    at = call.ended or call.started or call.due or call.submitted
    error = gist(call.error)[:100]
    return f"{call.id}  {call.state:<9}  {_moment(at)}  {call.deployment}.{call.method or '__call__'}  {error}".rstrip()


def _relative(each: Relative) -> dict[str, Any]:
    facts = facts_of(each.call) if each.call is not None else {"id": each.id}
    return facts | {"depth": each.depth, "not_shown": each.not_shown}


def _branch(each: Relative, here: str) -> str:
    text = _line(each.call) if each.call is not None else f"{each.id}  its record has expired"
    more = f"  and {each.not_shown:,} more calls" if each.not_shown else ""
    return f"{'> ' if each.id == here else '  '}{'  ' * each.depth}{text}{more}"


def _list_troubles(state: State, wanted: CallFilter, limit: int, as_json: bool) -> None:
    names = [wanted.deployment] if wanted.deployment else state.names()
    shown = 0
    for entry, deployment, trouble in read_troubles(state.redis, state.keys, names, most=1000):
        at = int(entry.split("-")[0]) / 1000
        if at < wanted.since or not _fits(trouble, wanted):
            continue
        if shown == limit:
            break
        shown += 1
        line = _trouble_json(at, deployment, trouble) if as_json else visible(_trouble_line(at, deployment, trouble))
        click.echo(line)
    if not shown:
        note(none_found(_NONE, [wanted.deployment] if wanted.deployment else [], state))


def _fits(trouble: Trouble, wanted: CallFilter) -> bool:
    is_call = trouble.what not in _OF_REPLICAS
    fits = not wanted.method or (is_call and (trouble.method or "__call__") == wanted.method)
    return fits and wanted.error.lower() in trouble.error.lower()


def _trouble_json(at: float, deployment: str, trouble: Trouble) -> str:
    names = trouble.__struct_fields__
    return json.dumps({"at": at, "deployment": deployment} | {name: getattr(trouble, name) for name in names})


def _trouble_line(at: float, deployment: str, trouble: Trouble) -> str:
    many = f" x{trouble.times}" if trouble.times > 1 else ""
    ran = f"  {trouble.ran_ms:.0f} ms" if trouble.ran_ms else ""
    method = trouble.method or "__call__"
    of_a_call = f"{deployment}.{method}  {trouble.request or trouble.call}"
    which = f"{deployment}  {trouble.replica}" if trouble.what in _OF_REPLICAS else of_a_call
    return f"{_moment(at)}  {trouble.what}{many}{ran}  {which}  {gist(trouble.error)[:100]}"


def _moment(at: Any) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
