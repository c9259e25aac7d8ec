"""The mistakes that newcomers make before anything is started: what each of them is told. See tests/mistakes.toml."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fastapi import FastAPI

from qserve import serve
from qserve.cli.command_line import main
from qserve.errors import QServeError
from tests.support.mistakes import TABLE, names, source_of

ROWS = TABLE["before"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder of a newcomer, who has no instance; what is imported from there is forgotten at the end."""
    project, runtime = tmp_path / "project", tmp_path / "runtime"
    project.mkdir()
    runtime.mkdir(mode=0o700)
    monkeypatch.chdir(project)
    monkeypatch.setenv("QSERVE_RUNTIME_DIR", str(runtime))
    for name in ("QSERVE_APP", "QSERVE_REDIS_URL", "QSERVE_SECRET", "QSERVE_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("qserve.cli.command_line._STARTS_INSTANCE", ())  # nothing is started here before it is needed
    before = set(sys.modules)
    yield project
    for name in set(sys.modules) - before:
        if str(project) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("row", ROWS, ids=names(ROWS))
def test_a_mistake_is_told_in_words(folder: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any]) -> None:
    said = told_on_the_command_line(folder, monkeypatch, row) if "run" in row else told_to_code(row["code"])
    assert row["says"] in said
    assert "pydantic" not in said
    assert "/qserve/" not in said.replace(str(folder), "")  # no frames of ours


def told_on_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any]) -> str:
    files = {"app.py": row["app"]} if "app" in row else {}
    for name, text in {**files, **row.get("files", {})}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source_of(text))
    for name, value in row.get("environment", {}).items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(main, row["run"])
    assert done.exit_code in (1, 2), done.output
    assert isinstance(done.exception, SystemExit), done.exception
    return done.output


def told_to_code(text: str) -> str:
    with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError, QServeError)) as caught:
        exec(text, {"serve": serve, "app": FastAPI(), "__name__": "app"})
    return str(caught.value)


def test_there_are_forty_of_them() -> None:
    assert len(ROWS) + len(TABLE["served"]) >= 40
