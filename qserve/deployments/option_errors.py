"""What pydantic finds wrong with options, said in words for whoever wrote them."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

_LONGEST_VALUE = 60


@contextmanager
def told_in_words(names: Iterable[str], shown: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """A block in which pydantic's ValidationError becomes a plain ValueError.

    Args:
        names: The options that exist, to suggest one where a name is not among them.
        shown: How options are called that have several names.
    """
    try:
        yield
    except ValidationError as exc:
        raise ValueError(in_words(exc, names, shown)) from None


def in_words(exc: ValidationError, names: Iterable[str], shown: Mapping[str, str] = MappingProxyType({})) -> str:
    """One sentence for each thing that is wrong."""
    known = list(names)
    errors = exc.errors(include_url=False, include_context=False)
    places = (".".join(shown.get(str(step), str(step)) for step in error["loc"]) for error in errors)
    return " ".join(sentence(error, place, known) for error, place in zip(errors, places, strict=True))


def sentence(error: Any, place: str, names: Iterable[str]) -> str:
    """What is wrong at a place.

    Args:
        error: One of those that a ValidationError lists.
        names: The options that exist there.
    """
    if error["type"] == "missing":
        return f"{place} is missing."
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(error["loc"][-1]), names, n=1)
        return f"There is no option {place!r}." + (f" Did you mean {close[0]!r}?" if close else "")
    if error["type"] in ("value_error", "assertion_error"):
        said = str(error["msg"]).partition(", ")[2]
        return f"{place}: {said}" if place else said
    value = repr(error["input"])
    value = value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}..."
    wanted = str(error["msg"]).partition(", unable")[0].replace("Input should", "it should", 1)
    return f"{place}={value} is not possible: {wanted}."
