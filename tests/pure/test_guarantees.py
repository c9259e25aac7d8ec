"""Every promise of docs/guarantees.md is listed in docs/guarantees-tests.md with tests that exist."""

import re

from tests.support.node_ids import node_ids
from tests.support.serving import ROOT

PROMISES = (ROOT / "docs/guarantees.md").read_text()
SHOWN = (ROOT / "docs/guarantees-tests.md").read_text()
WITHOUT_PROMISE = {"", "What a caller sees"}
"""Sections that explain; `test_gateway_app.py` has the statuses of all errors."""


def sections(document: str) -> dict[str, str]:
    """Heading -> text."""
    intro, *rest = re.split(r"^## ", document, flags=re.MULTILINE)
    return {"": intro} | {part.partition("\n")[0]: part.partition("\n")[2] for part in rest}


def items_of(text: str) -> list[str]:
    """The points of the lists in a section."""
    return re.findall(r"^(?:\d+\.|-) +((?:.*\n?)(?: +.*\n?)*)", text, re.MULTILINE)


def promises() -> dict[str, list[str]]:
    """Heading -> the names of its promises, which stand in bold at the beginning of each point."""
    named = {}
    for heading, text in sections(PROMISES).items():
        if heading not in WITHOUT_PROMISE:
            names = [re.match(r"\*\*(.+?)\*\*", item, re.DOTALL) for item in items_of(text)]
            named[heading] = [" ".join(name[1].split()) if name else "(a point without a name)" for name in names]
    return named


def rows(text: str) -> list[tuple[str, str]]:
    """Promise and test of each row; a row without a promise goes with the one before."""
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and cells[-1].startswith("`"):
            found.append((cells[0] or found[-1][0], cells[-1].strip("`")))
    return found


def test_every_promise_is_listed_with_its_tests_and_nothing_else_is() -> None:
    listed = {heading: rows(text) for heading, text in sections(SHOWN).items() if heading}
    assert {heading: list(dict.fromkeys(name for name, _ in found)) for heading, found in listed.items()} == promises()
    assert sum(len(names) for names in promises().values()) >= 40


def test_every_section_but_those_that_explain_is_a_list_of_promises() -> None:
    assert [heading for heading, names in promises().items() if not names] == []


def test_every_test_that_is_listed_exists() -> None:
    files = {path.name: path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    named = [test for _, test in rows(SHOWN)]
    missing = [
        test
        for test in named
        for file, _, name in [test.partition("::")]
        if f"{files.get(file)}::{name}" not in node_ids(files.get(file, file))
    ]
    assert missing == []
    assert len(named) >= 60
