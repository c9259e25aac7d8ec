"""`qserve call`: one call from the shell."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

import click

from qserve.broker.instance.state import State
from qserve.calls.handle import get_handle
from qserve.calls.process_client import set_settings_finder
from qserve.cli.instance import connected
from qserve.cli.output import Failure, Seconds, redis_url_option
from qserve.deployments.local_instance import find_settings
from qserve.errors import MethodNotFound, TaskError, failure_of
from qserve.tracebacks import users_part
from qserve.wire.exceptions import plain_text

_FRAME = '  File "'


@click.command(context_settings={"ignore_unknown_options": True})
@redis_url_option
@click.option("--timeout", type=Seconds(0.001), default=60.0, help="Seconds to wait for the result.", show_default=True)
@click.argument("name")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[METHOD] [ARG | KEY=VALUE]...")
def call(name: str, arguments: tuple[str, ...], timeout: float) -> None:
    """Call the deployment NAME and print what it returns.

    Arguments are JSON where they parse as JSON, else strings: 3, [1,2], true, hello, KEY=VALUE. For a class, a first
    word that could be a method's name is taken for one. `qserve call Echo __call__ hello` passes the word on instead.

    Results are printed as JSON where they can be, else as their repr.
    """
    with connected() as state:
        deployed = state.get(name)
        if deployed is None:
            raise Failure(unknown_deployment(name, state.list()))
    method, args, kwargs = parse_call(arguments, may_have_method=deployed.spec.is_class)
    set_settings_finder(find_settings)
    handle = get_handle(name).options(method_name=method, timeout_s=timeout)
    try:
        result = handle.remote(*args, **kwargs).result()
    except MethodNotFound as exc:
        raise Failure(f"{exc} To pass {method!r} as an argument: qserve call {name} __call__ {method}") from exc
    except TaskError as exc:
        raise Failure(describe(exc)) from exc
    click.echo(show(result))


def parse_call(words: tuple[str, ...], *, may_have_method: bool) -> tuple[str, list[Any], dict[str, Any]]:
    """(method, args, kwargs) of the words on a command line; method is "" for `__call__`."""
    method = ""
    if may_have_method and words and words[0].isidentifier() and words[0] not in ("true", "false", "null"):
        method, words = words[0].replace("__call__", ""), words[1:]
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key.isidentifier():
            kwargs[key] = parse_value(value)
        elif kwargs:
            raise click.UsageError(f"The argument {word!r} stands after a KEY=VALUE. Put it before.")
        else:
            args.append(parse_value(word))
    return method, args, kwargs


def parse_value(text: str) -> Any:
    """JSON where it is JSON, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
    except RecursionError as exc:
        raise click.UsageError(f"The argument {text[:40]!r} is nested too deep.") from exc


def show(result: object) -> str:
    """JSON where the value survives it, else its repr."""
    try:
        return plain_text(json.dumps(result, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError):
        return plain_text(repr(result))


def describe(exc: TaskError) -> str:
    """A remote error: what it is first, then where in the user's code it came from."""
    failure = failure_of(exc)
    head = f"{failure.type_name}: {failure.message}" if failure.type_name else failure.message
    trail = users_part(failure.traceback_text)
    return f"{head}\n\n{trail}" if _FRAME in trail else head


def unknown_deployment(name: str, known: Iterable[str]) -> str:
    """What to say about a name that is not deployed."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"There is no deployment {name!r}. Did you mean {close[0]!r}?"
    return f"There is no deployment {name!r}. Deployed: {', '.join(names) or 'nothing'}."


def none_found(text: str, names: Iterable[str], state: State) -> str:
    """What to say where nothing was found of some deployments: the text, and which of them do not exist."""
    known = state.list()
    return " ".join([text, *(unknown_deployment(name, known) for name in names if name not in known)])
