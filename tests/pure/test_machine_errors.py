"""What users are told when their machine or their PYTHONPATH is in the way."""

import errno
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qserve.cli.project.hidden_modules import what_hides
from qserve.errors import ConfigurationError
from qserve.this_machine import machine_errors


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/y"),
            r"no room .*: /x/y: No space left on device\. Free some",
        ),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/x"), r"/x: Read-only file system\. .* QSERVE_RUNTIME_DIR"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), r"Too many open files\. Raise `ulimit -n`"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), r"a folder in TMPDIR"),
    ],
)
def test_what_the_machine_refuses_is_told_with_what_to_do(error: OSError, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says), machine_errors():
        raise error


def test_other_errors_of_the_system_stay_what_they_are() -> None:
    with pytest.raises(FileNotFoundError), machine_errors():
        raise FileNotFoundError(errno.ENOENT, "No such file", "/x")


@pytest.fixture
def hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A redis.py on PYTHONPATH, imported in the place of the module."""
    made = ModuleType("redis")
    made.__file__ = str(tmp_path / "redis.py")
    monkeypatch.setitem(sys.modules, "redis", made)
    monkeypatch.setenv("PYTHONPATH", f"/nowhere{os.pathsep}{tmp_path}")
    return tmp_path / "redis.py"


def test_a_file_on_pythonpath_that_hides_a_module_is_named(hidden: Path) -> None:
    missing_name = ImportError("cannot import name 'Redis'", name="redis", path=str(hidden))
    missing_attribute = AttributeError("no attribute", name="Redis", obj=sys.modules["redis"])

    for error in (missing_name, missing_attribute, ModuleNotFoundError("not a package", name="redis.asyncio")):
        said = what_hides(error)
        assert said is not None
        assert said.startswith(f"{hidden} hides the module 'redis'")


def test_an_installed_module_hides_nothing(hidden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")

    assert what_hides(ImportError("x", name="redis")) is None
