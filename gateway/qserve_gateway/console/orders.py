"""What an operator asks for in a form, and what comes of it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from qserve.broker.instance.state import State
from qserve.settings import Settings

MOST_AT_ONCE: Final = 1_000
_MOST_DIGITS: Final = 12

Form = Mapping[str, Sequence[str]]


class NotPossible(Exception):
    """The action makes no sense; the text says why."""


class Done(NamedTuple):
    """What came of an action.

    Attributes:
        said: A sentence.
        place: Where to go now; "" for where the form was.
    """

    said: str
    place: str = ""


class Order(NamedTuple):
    """An action that somebody asks for.

    Attributes:
        who: Who asks, as the audit calls them.
        about: The deployment, call, schedule or node.
        form: The fields of the form; each has one value or several.
    """

    state: State
    settings: Settings
    who: str
    about: str
    form: Form

    def text(self, name: str) -> str:
        """The last value of a field; "" where there is none."""
        return (self.form.get(name) or [""])[-1].strip()

    def number(self, name: str, most: int, least: int = 1) -> int:
        """The number in a field; raises `NotPossible` if it is none in these bounds."""
        text = self.text(name)
        number = int(text) if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS else -1
        if not least <= number <= most:
            raise NotPossible(f"{name} must be a number from {least} to {most:,}, not {text[:40]!r}")
        return number

    def json(self, name: str, default: Any) -> Any:
        """The JSON in a field; raises `NotPossible` if it is none."""
        text = self.text(name)
        try:
            return json.loads(text) if text else default
        except (ValueError, RecursionError) as exc:
            raise NotPossible(f"{name} is no JSON: {exc}") from exc

    @property
    def ids(self) -> Sequence[str]:
        """What is selected, as much of it as is done at once."""
        return self.form.get("id", [])[:MOST_AT_ONCE]


def result(count: int, what: str, said: str, failures: Sequence[str]) -> str:
    """What became of several things that were asked for together."""
    text = f"{count} {what}{'s' if count != 1 else ''} {said}."
    return text if not failures else f"{text} {len(failures)} left as they are: {failures[0]}"
