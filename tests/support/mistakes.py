"""The table of the mistakes that newcomers make."""

import tomllib
from typing import Any

from tests.support.serving import ROOT

TABLE: dict[str, list[dict[str, Any]]] = tomllib.loads((ROOT / "tests/mistakes.toml").read_text())
HELLO = "from qserve import serve\n\n\n@serve.deployment\ndef hello() -> str:\n    return 'hello'\n"


def source_of(text: str) -> str:
    """What a file of a row has in it."""
    return HELLO if text == "hello" else f"from qserve import serve\n\n\n{text}\n" if "serve." in text else text


def names(rows: list[dict[str, Any]]) -> list[str]:
    """What a test run calls the rows."""
    return [row["mistake"].replace(" ", "-") for row in rows]
