"""The mistakes that newcomers make with what is served: what each of them is told. See tests/mistakes.toml."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from qserve import serve
from qserve.cli import main
from qserve.testing import TestInstance
from tests.support.mistakes import TABLE, names

ROWS = TABLE["served"]


class Model:
    def __call__(self) -> object:
        return object()

    def predict(self, value: int) -> int:
        return value + 1


@pytest.fixture(scope="module")
def model(qserve_instance: TestInstance) -> Iterator[None]:
    deployment = serve.deployment(Model)
    deployment.deploy()
    yield
    deployment.delete()


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("row", ROWS, ids=names(ROWS))
def test_a_mistake_is_told_in_words(http: httpx.Client, row: dict[str, Any]) -> None:
    if "get" in row:
        assert row["says"] in http.get(row["get"]).text
    elif "run" in row:
        done = CliRunner().invoke(main, row["run"])
        assert done.exit_code == 1
        assert row["says"] in done.output
    else:
        with pytest.raises(Exception) as caught:  # noqa: PT011 what it is differs, what it says is in the table
            exec(row["code"], {"serve": serve})
        assert row["says"] in str(caught.value)
