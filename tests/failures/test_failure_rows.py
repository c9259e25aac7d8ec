"""The table of failures is complete, and every test it names exists."""

import tomllib
from pathlib import Path

from tests.behaviours.test_rows import node_ids

ROWS = tomllib.loads(Path(__file__).with_name("rows.toml").read_text())
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
    here = Path(__file__).parent
    files = [f"tests/failures/{path.name}" for path in here.glob("test_*.py") if path != Path(__file__)]

    unnamed = sorted(test for file in files for test in node_ids(file) if test not in named)
    assert unnamed == []
