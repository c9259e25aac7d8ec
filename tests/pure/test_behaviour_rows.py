"""The table of behaviours is complete, and every test it names exists."""

import tomllib

from tests.support.node_ids import node_ids
from tests.support.serving import ROOT

FOLDER = ROOT / "tests/instance/behaviours"
ROWS = tomllib.loads((FOLDER / "rows.toml").read_text())

LAST_ROWS = {1: 13, 2: 24, 3: 4, 4: 11, 5: 11, 6: 17, 7: 16, 8: 6, 9: 8, 10: 9, 11: 12}
"""Areas and the number of their last row."""
WITHOUT_TEST = {
    "4.3": "a health page is not part of the behaviour that is promised",
    "5.10": "WebSockets are beyond it",
}
"""Rows nothing is promised about, and why."""


def test_every_row_is_in_the_table() -> None:
    rows = [f"{area}.{row}" for area, last in LAST_ROWS.items() for row in range(1, last + 1)]

    assert [row for row in [*rows, "1.errors"] if row not in WITHOUT_TEST and row not in ROWS] == []
    assert ROWS.keys() - {*rows, "1.errors"} == set()
    assert ROWS.keys() & WITHOUT_TEST.keys() == set()


def test_every_row_says_something_and_names_a_test() -> None:
    for row, content in ROWS.items():
        assert content.keys() == {"says", "shown_by"}, row
        assert content["says"].endswith("."), row
        assert content["shown_by"], row


def test_every_test_that_is_named_exists() -> None:
    named = {test for content in ROWS.values() for test in content["shown_by"]}

    assert sorted(test for test in named if test not in node_ids(test.partition("::")[0])) == []


def test_no_file_of_behaviours_is_without_a_row() -> None:
    files = sorted(path.relative_to(ROOT).as_posix() for path in FOLDER.glob("test_*.py"))
    named = {test for content in ROWS.values() for test in content["shown_by"]}

    unused = [file for file in files if not named & node_ids(file)]
    assert unused == []
