"""What users are told when their machine or their PYTHONPATH is in the way."""

import errno
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qserve import cli
from qserve.cli.project.hidden_modules import what_hides
from qserve.errors import ConfigurationError
from qserve.this_machine import is_running, machine_errors, runtime_folder, this_host


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


def test_a_folder_for_keys_that_others_may_enter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSERVE_RUNTIME_DIR", str(tmp_path))
    assert runtime_folder() == tmp_path / "qserve"
    assert runtime_folder().stat().st_mode & 0o077 == 0
    runtime_folder().chmod(0o750)
    with pytest.raises(ConfigurationError, match=f"`chmod 700 {tmp_path}/qserve` if it is yours"):
        runtime_folder()


def test_a_process_runs_until_it_has_ended() -> None:
    assert is_running(os.getpid())
    assert is_running(1)
    assert not is_running(2**22 + 1), "Linux gives lower pids only"


def test_a_machine_that_cannot_be_told_from_others_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_host() == this_host()
    assert ":pid:[" in this_host()

    def missing(*_: object, **__: object) -> str:
        raise OSError("no /proc here")

    monkeypatch.setattr(Path, "read_text", missing)
    assert this_host.__wrapped__() == ""


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


def test_the_command_says_so_and_shows_other_errors(hidden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cli, "command_line", raising=False)
    broken = _Broken(ImportError("cannot import name 'Redis'", name="redis", path=str(hidden)))
    monkeypatch.setitem(sys.modules, "qserve.cli.command_line", None)
    with pytest.raises(ModuleNotFoundError, match="command_line"):
        cli.main()
    monkeypatch.setitem(sys.modules, "qserve.cli.command_line", broken)
    with pytest.raises(SystemExit, match=f"^Error: {hidden} hides the module 'redis'"):
        cli.main()


class _Broken(ModuleType):
    """A module that cannot do what it is there for."""

    def __init__(self, error: Exception) -> None:
        super().__init__("broken")
        self._error = error

    def main(self) -> None:
        raise self._error


def test_an_installed_module_hides_nothing(hidden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")

    assert what_hides(ImportError("x", name="redis")) is None
