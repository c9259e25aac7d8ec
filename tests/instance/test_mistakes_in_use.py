"""The mistakes that newcomers make with what is served: what each of them is told. See tests/mistakes.toml."""

from typing import Any

import httpx
from click.testing import CliRunner

from qserve import serve
from qserve.cli.command_line import main
from tests.support.mistakes import TABLE


class Model:
    def __call__(self) -> object:
        return object()

    def predict(self, value: int) -> int:
        return value + 1


def told(row: dict[str, Any], http: httpx.Client) -> str:
    """What somebody gets who does that."""
    if "get" in row:
        return http.get(row["get"]).text
    if "run" in row:
        done = CliRunner().invoke(main, row["run"])
        assert done.exit_code == 1, done.output
        return done.output
    try:
        exec(row["code"], {"serve": serve})
    except Exception as exc:
        return str(exc)
    return "nothing"


def test_each_mistake_is_told_in_words(http: httpx.Client) -> None:
    serve.deployment(Model).deploy()
    answers = {row["mistake"]: (row["says"], told(row, http)) for row in TABLE["served"]}
    assert {mistake: pair for mistake, pair in answers.items() if pair[0] not in pair[1]} == {}
