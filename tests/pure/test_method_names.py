"""Which methods can be called, seen from the class."""

from collections.abc import Callable
from typing import Any

import pytest

from qserve.user_code.method_names import method_names, problem_of


class Base:
    def inherited(self) -> None: ...


class Shop(Base):
    declared: Callable[[], int]

    def __init__(self, other: Any) -> None:
        self.kept_callable = other

    def price(self) -> None: ...

    def _private(self) -> None: ...

    @property
    def computed(self) -> Callable[[], int]:
        return lambda: 1


class Anything:
    def __getattr__(self, name: str) -> Any:
        return lambda: name


def alone() -> None: ...


@pytest.mark.parametrize("name", ["inherited", "declared", "kept_callable", "price", "_private", "computed"])
def test_what_might_be_called_is_no_problem(name: str) -> None:
    assert problem_of(name, method_names(Shop)) == ""


def test_what_cannot_be_called_is_told_with_what_can() -> None:
    assert problem_of("prize", method_names(Shop)).startswith("it has no method 'prize': there are computed, declared")
    assert "no method '__call__'" in problem_of("", method_names(Shop))
    assert problem_of("", method_names(alone)) == ""
    assert problem_of("price", method_names(alone)) == "a function has no method 'price'"


def test_any_name_may_be_called_where_the_class_finds_attributes_itself_or_nothing_is_known() -> None:
    assert method_names(Anything) == ()
    assert problem_of("whatever", method_names(Anything)) == problem_of("", ()) == ""
