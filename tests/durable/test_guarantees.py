"""What the guarantees name as their proof exists, and nothing is promised without one."""

import re
from pathlib import Path

from tests.behaviours.test_rows import node_ids

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/guarantees.md").read_text()
WITHOUT_PROMISE = {"", "What a caller sees"}
"""Sections that explain; `test_gateway_app.py` has the statuses of all errors."""
_MEASURED = "make bench"
_NAMED = re.compile(r"`(?:(?:tests/)?(?:\w+/)*(test_\w+\.py)::)?((?:\w+::)?test_\w+)`")


def sections() -> dict[str, str]:
    """Heading -> text."""
    intro, *rest = re.split(r"^## ", DOCUMENT, flags=re.MULTILINE)
    return {"": intro} | {part.partition("\n")[0]: part.partition("\n")[2] for part in rest}


def test_every_test_that_the_guarantees_name_exists() -> None:
    files = {path.name: path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    found, missing, file = 0, [], ""
    for named, test in _NAMED.findall(DOCUMENT):
        file = named or file  # without a file: of the one named before
        tests = node_ids(files.get(file, file))
        if not any(each.endswith(f"::{test}") for each in tests):
            missing.append(f"{file}::{test}")
        found += 1
    assert missing == []
    assert found >= 60


def test_nothing_is_promised_without_a_test() -> None:
    without = []
    for heading, text in sections().items():
        if heading in WITHOUT_PROMISE:
            continue
        items = (item.strip() for item in re.split(r"^(?:\d\.|-) |\n\n", text, flags=re.MULTILINE))
        without += [item for item in items if item and not (_NAMED.search(item) or _MEASURED in item)]
    assert [item for item in without if not item.endswith(("promised more.", "With a full queue:"))] == []
