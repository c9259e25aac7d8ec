"""What the guarantees name as their proof exists."""

import re
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT = HERE.parent.parent / "docs/guarantees.md"


def test_every_test_that_the_guarantees_name_exists() -> None:
    text = DOCUMENT.read_text().partition("## Durable calls")[2].partition("\n## ")[0]
    named = re.findall(r"`(test_\w+\.py)::(?:\w+::)?(test_\w+)`", text)

    assert len(named) >= 10
    missing = [each for each in named if f"def {each[1]}(" not in (HERE / each[0]).read_text()]
    assert missing == []
    sentences = re.split(r"^\d\. ", text, flags=re.MULTILINE)[1:]
    assert [sentence for sentence in sentences if "::test_" not in sentence] == []
