"""`qserve dead`: calls that were given up on."""

import json
import time

import click

from qserve.broker.instance.state import State
from qserve.cli.call import none_found
from qserve.cli.instance import connected
from qserve.cli.output import Failure, note, redis_url_option, visible
from qserve.deployments.local_instance import find_settings
from qserve.durable.dead_letters import DeadLetters, Letter
from qserve.errors import BrokerUnavailable, ConfigurationError, QServeError
from qserve.operating.operators import write_down


@click.group()
def dead() -> None:
    """List, show, send again or drop calls that were given up on.

    Those are calls that killed every replica they were given to, durable calls whose retries are used up, and frames
    that no key of the instance signed. A durable call that is sent again answers its old id.
    """


@dead.command()
@redis_url_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each, a line each.")
@click.argument("name", required=False)
def ls(name: str | None, as_json: bool) -> None:
    """List the dead letters, of the deployment NAME or of all."""
    with connected() as state:
        letters = _dead_letters(state)
        found = list(letters.all() if name is None else letters.of(name))
        for letter in found:
            if as_json:
                click.echo(json.dumps(letter.facts()))
                continue
            call_id = letter.call.id if letter.call is not None else "-"
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(letter.at / 1000))
            tries = "" if letter.attempts is None else f"  {letter.attempts} attempts"
            line = f"{letter.deployment}  {letter.id}  {call_id}  {when}{tries}  {letter.reason[:120]}"
            click.echo(visible(line))
        if not found:
            none = f"There are no dead letters{f' of {name}' if name else ''}."
            note(none_found(none, [name] if name else [], state))


@dead.command()
@redis_url_option
@click.argument("name")
@click.argument("letter")
def show(name: str, letter: str) -> None:
    """Show one dead letter. LETTER is its id, or the id of its call."""
    with connected() as state:
        letters = _dead_letters(state)
        found = letters.get(name, letter)
        facts = found.facts() | letters.contents(found)
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False))


@dead.command()
@redis_url_option
@click.option("--all", "every", is_flag=True, help="All dead letters of the deployment NAME.")
@click.argument("name")
@click.argument("letter", required=False)
def retry(name: str, letter: str | None, every: bool) -> None:
    """Send one dead letter again, or --all of NAME, and print the ids by which the results can be fetched."""
    with connected() as state:
        letters = _dead_letters(state)
        chosen, left = _chosen(state, letters, name, letter, every), 0
        for found in chosen:
            try:
                click.echo(letters.retry(found))
                write_down(state, "send again", f"dead letter {found.id} of {name}")
            except (BrokerUnavailable, ConfigurationError):
                raise  # as all that follow would, each after its time
            except QServeError as exc:
                if not every:
                    raise
                note(f"{found.id}: {exc}")
                left += 1
        if left:
            raise Failure(f"{left} of {len(chosen)} dead letters were left as they are.")


@dead.command()
@redis_url_option
@click.option("--all", "every", is_flag=True, help="All dead letters of the deployment NAME.")
@click.argument("name")
@click.argument("letter", required=False)
def drop(name: str, letter: str | None, every: bool) -> None:
    """Forget one dead letter, or --all of NAME."""
    with connected() as state:
        letters = _dead_letters(state)
        for found in _chosen(state, letters, name, letter, every):
            letters.drop(found)
            write_down(state, "drop", f"dead letter {found.id} of {name}")
            note(f"{found.id}: dropped")


def _dead_letters(state: State) -> DeadLetters:
    return DeadLetters(state, find_settings().out_of_line_bytes)


def _chosen(state: State, letters: DeadLetters, name: str, letter: str | None, every: bool) -> list[Letter]:
    if every == (letter is not None):
        raise Failure("Name one letter, or give --all.")
    found = list(letters.of(name)) if letter is None else [letters.get(name, letter)]
    if not found:
        note(none_found(f"There are no dead letters of {name}.", [name], state))
    return found
