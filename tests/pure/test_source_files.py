"""Which files code comes from, and whether they have changed."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qserve.user_code.source_files import changed_files, source_digests


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "sourced"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "cart.py").write_text("from sourced import prices")
    (folder / "prices.py").write_text("PRICE = 1")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("sourced.cart")
    yield folder
    for name in ("sourced", "sourced.prices", "sourced.cart"):
        del sys.modules[name]


@pytest.mark.parametrize("installed", [False, True])
def test_every_file_that_code_comes_from_is_compared(package: Path, installed: bool) -> None:
    folders = () if installed else (str(package.parent),)
    sources = source_digests(folders, "sourced.cart", is_pickled=False)
    assert [Path(path).name for path, _ in sources] == ["__init__.py", "cart.py", "prices.py"]
    assert changed_files(sources) == []
    (package / "prices.py").write_text("PRICE = 2")
    assert changed_files(sources) == [str(package / "prices.py")]
    (package / "cart.py").unlink()
    assert changed_files(sources) == [str(package / "cart.py"), str(package / "prices.py")]


def test_nothing_is_known_of_files_that_are_not_here() -> None:
    assert changed_files(()) is None
    assert changed_files((("/no/such/folder/app.py", "0123"),)) is None
    assert changed_files((("/dev/zero", "0123"),)) is None


def test_a_script_whose_code_is_pickled_needs_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("")
    monkeypatch.setattr("__main__.__file__", str(script), raising=False)
    assert source_digests([str(tmp_path)], "__main__", is_pickled=True) == ()
    [(path, _)] = source_digests([str(tmp_path)], "__main__", is_pickled=False)
    assert path == str(script)
