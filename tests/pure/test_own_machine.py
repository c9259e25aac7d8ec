"""What a command takes over from the shell and the machine it runs on."""

import getpass
import socket

import pytest

from qserve.operating.operators import user_of_this_machine
from qserve.screen.own_console import CONSOLE_PORT, console_environment


@pytest.mark.parametrize("error", [KeyError("uid not found"), OSError("no username set")])
def test_a_user_without_a_name_is_somebody(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def no_name() -> str:
        raise error

    assert user_of_this_machine() == f"{getpass.getuser()}@{socket.gethostname()}"
    monkeypatch.setattr(getpass, "getuser", no_name)
    assert user_of_this_machine() == f"somebody@{socket.gethostname()}"


@pytest.mark.parametrize(
    ("set_by_user", "added"),
    [
        ({}, {"QSERVE_CONSOLE_OPEN": "1", "QSERVE_ADMIN_PORT": str(CONSOLE_PORT)}),
        ({"QSERVE_CONSOLE_OPEN": "0"}, {"QSERVE_ADMIN_PORT": str(CONSOLE_PORT)}),
        ({"QSERVE_ADMIN_PORT": "9000"}, {"QSERVE_CONSOLE_OPEN": "1"}),
        ({"QSERVE_ADMIN_HOST": "0.0.0.0"}, {}),
    ],
)
def test_the_console_is_open_to_this_machine_only(
    monkeypatch: pytest.MonkeyPatch, set_by_user: dict[str, str], added: dict[str, str]
) -> None:
    for name in ("QSERVE_CONSOLE_OPEN", "QSERVE_ADMIN_PORT", "QSERVE_ADMIN_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    assert console_environment() == added
