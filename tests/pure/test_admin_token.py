"""The token of the admin listener: where it comes from, and that nothing opens the listener by accident."""

import os
import stat
from pathlib import Path

import pytest

from qserve.errors import ConfigurationError
from qserve.settings import Settings
from qserve_gateway.admin.admin_app import admin_token, token_path
from qserve_gateway.console.sessions import Sessions


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QSERVE_RUNTIME_DIR", str(tmp_path))
    return token_path(Settings().namespace)


def test_one_is_made_once_and_only_its_user_may_read_it(file: Path) -> None:
    token = admin_token(Settings())
    assert len(token) > 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert admin_token(Settings()) == token
    assert [*file.parent.iterdir()] == [file]


def test_an_empty_file_is_none(file: Path) -> None:
    """A power failure leaves one: a request with an empty token would have been let in."""
    file.write_text("\n")
    token = admin_token(Settings())
    assert len(token) > 32
    assert file.read_text().strip() == token


def test_what_a_killed_gateway_has_left_keeps_no_other_from_making_one(file: Path) -> None:
    """Processes of a container that is started again have the numbers of those before."""
    file.with_name(f"{file.name}.{os.getpid()}").touch()
    assert len(admin_token(Settings())) > 32


def test_spaces_and_line_ends_around_a_token_do_not_count(file: Path) -> None:
    settings = Settings(admin_token="one\n", console_viewer_token=" two\n")
    sessions = Sessions(settings, admin_token(settings))
    assert [sessions.role_of(token) for token in ("one", "two", "", "\n")] == ["operator", "viewer", "", ""]
    assert not file.exists()


@pytest.mark.parametrize("token", ["", " ", "\n"])
def test_a_listener_for_other_machines_needs_one_that_is_not_empty(token: str) -> None:
    with pytest.raises(ConfigurationError, match="set QSERVE_ADMIN_TOKEN too"):
        admin_token(Settings(admin_host="0.0.0.0", admin_token=token))
