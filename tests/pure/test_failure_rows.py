"""The table of failures is complete, and every test it names exists."""

import tomllib

from tests.support.node_ids import node_ids
from tests.support.serving import ROOT

FOLDER = ROOT / "tests/faults/failures"
ROWS = tomllib.loads((FOLDER / "rows.toml").read_text())
LAST_ROWS = {"1.1": 13, "1.2": 12, "1.3": 12, "1.4": 7}
"""Parts of the table and the number of their last row."""


def test_every_failure_is_in_the_table() -> None:
    assert list(ROWS) == [f"{part}.{row}" for part, last in LAST_ROWS.items() for row in range(1, last + 1)]


def test_every_failure_has_a_promise_and_a_test() -> None:
    for row, content in ROWS.items():
        assert content.keys() == {"breaks", "says", "shown_by"}, row
        assert content["says"].endswith("."), row
        assert content["shown_by"], row


def test_every_test_that_is_named_exists() -> None:
    named = {test for content in ROWS.values() for test in content["shown_by"]}

    assert sorted(test for test in named if test not in node_ids(test.partition("::")[0])) == []


def test_no_test_of_failures_is_without_a_row() -> None:
    named = {test for content in ROWS.values() for test in content["shown_by"]}
    files = [path.relative_to(ROOT).as_posix() for path in FOLDER.glob("test_*.py")]

    unnamed = sorted(test for file in files for test in node_ids(file) if test not in named)
    assert unnamed == []
