"""`qserve dead`: calls that were given up on."""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import click
import msgspec

from qserve.cli.instance import connected
from qserve.cli.output import Failure, note, redis_url_option
from qserve.codec import Codec
from qserve.deadletters import DeadLetters, Letter
from qserve.errors import QServeError
from qserve.messages import HTTP, decode_http_request
from qserve.state import State

_LONGEST_SHOWN = 2000


@click.group()
def dead() -> None:
    """List, show, send again or drop calls that were given up on.

    Those are calls that killed every replica they were given to, durable calls whose retries are used up, and frames
    that no key of the instance signed. A durable call that is sent again answers its old id.
    """


@dead.command()
@redis_url_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.argument("name", required=False)
def ls(name: str | None, as_json: bool) -> None:
    """List the dead letters, of the deployment NAME or of all."""
    with connected() as state:
        for letter in _letters(state, name):
            if as_json:
                click.echo(json.dumps(_facts(letter)))
                continue
            call_id = letter.call.id if letter.call is not None else "-"
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(letter.at / 1000))
            tries = "" if letter.attempts is None else f"  {letter.attempts} attempts"
            click.echo(f"{letter.deployment}  {letter.id}  {call_id}  {when}{tries}  {letter.reason[:120]}")


@dead.command()
@redis_url_option
@click.argument("name")
@click.argument("letter")
def show(name: str, letter: str) -> None:
    """Show one: LETTER is its id, or that of its call."""
    with connected() as state:
        letters = DeadLetters(state)
        found = letters.get(name, letter)
        facts = _facts(found)
        if found.call is not None:
            facts |= _contents(letters, found, Codec(allow_pickle=False, max_bytes=1 << 40))
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False))


@dead.command()
@redis_url_option
@click.option("--all", "every", is_flag=True, help="Every one of NAME.")
@click.argument("name")
@click.argument("letter", required=False)
def retry(name: str, letter: str | None, every: bool) -> None:
    """Send one again, or --all of NAME; prints the ids by which the results can be had."""
    with connected() as state:
        letters = DeadLetters(state)
        for found in _chosen(letters, name, letter, every):
            try:
                click.echo(letters.retry(found))
            except QServeError as exc:
                if not every:
                    raise
                note(f"{found.id}: {exc}")


@dead.command()
@redis_url_option
@click.option("--all", "every", is_flag=True, help="Every one of NAME.")
@click.argument("name")
@click.argument("letter", required=False)
def drop(name: str, letter: str | None, every: bool) -> None:
    """Forget one, or --all of NAME."""
    with connected() as state:
        letters = DeadLetters(state)
        for found in _chosen(letters, name, letter, every):
            letters.drop(found)
            note(f"{found.id}: dropped")


def _letters(state: State, name: str | None) -> Iterator[Letter]:
    for each in [name] if name is not None else sorted(state.list()):
        yield from DeadLetters(state).of(each)


def _chosen(letters: DeadLetters, name: str, letter: str | None, every: bool) -> list[Letter]:
    if every == (letter is not None):
        raise Failure("Name one letter, or say --all.")
    return list(letters.of(name)) if letter is None else [letters.get(name, letter)]


def _facts(letter: Letter) -> dict[str, Any]:
    call = letter.call
    return {
        "letter": letter.id,
        "call": call.id if call is not None else None,
        "deployment": letter.deployment,
        "method": (call.method or "__call__") if call is not None else None,
        "durable": letter.durable,
        "attempts": letter.attempts,
        "reason": letter.reason,
    }


def _contents(letters: DeadLetters, letter: Letter, codec: Codec) -> dict[str, Any]:
    assert letter.call is not None
    try:
        payload = letters.payload(letter)
        if letter.call.kind != HTTP:
            args, kwargs = codec.unpack_call(payload)
            return {"args": _shown(args), "kwargs": _shown(kwargs)}
        request = decode_http_request(payload)
    except QServeError as exc:  # a pickle, or a payload that has expired
        return {"contents": str(exc)}
    query = b"?" + request.query_string if request.query_string else b""
    shown: dict[str, Any] = {"request": f"{request.method} {request.path}{query.decode('latin-1')}"}
    with contextlib.suppress(UnicodeDecodeError):
        shown["body"] = request.body[:_LONGEST_SHOWN].decode()
    return shown


def _shown(value: Any) -> Any:
    plain = msgspec.to_builtins(value, enc_hook=repr, str_keys=True)
    text = json.dumps(plain)
    return plain if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."
