"""Settings in the environment that have values which no process can work with."""

from typing import Any

import pytest
from click.testing import CliRunner

from qserve import serve
from qserve.cli.command_line import main
from qserve.config_file.logging_config import LoggingConfig
from qserve.deployments.http_options import HTTPOptions
from qserve.errors import ConfigurationError
from qserve.settings import Settings
from qserve.wire.options import DECLARED

IN_SECONDS = sorted(name for name in Settings.model_fields if name.endswith("_s") and not name.endswith("_per_s"))


@pytest.mark.parametrize("value", ["inf", "nan", "1e300", "0", "-1"])
@pytest.mark.parametrize("name", IN_SECONDS)
def test_numbers_of_seconds_are_such_that_clocks_can_count_them(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"QSERVE_{name.upper()}", value)
    with pytest.raises(ConfigurationError, match=f"QSERVE_{name.upper()}: Input should be"):
        Settings()


@pytest.mark.parametrize("name", [each.field for each in DECLARED if each.field.endswith("_s")])
def test_so_are_those_of_deployments(name: str) -> None:
    for value in (float("inf"), float("nan"), 1e300):
        options: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=f"{name}="):
            serve.deployment(**options)


def test_so_are_those_of_http() -> None:
    with pytest.raises(ValueError, match="request_timeout_s"):
        HTTPOptions(request_timeout_s=float("inf"))


@pytest.mark.parametrize(("given", "taken"), [("debug", "DEBUG"), ("Warning", "WARNING")])
def test_levels_of_the_log_may_be_written_in_any_case(given: str, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSERVE_LOG_LEVEL", given)
    assert Settings().log_level == taken
    assert LoggingConfig(log_level=given).level_name == given
    assert LoggingConfig(log_level=30).level_name == "WARNING"


def test_a_level_of_the_log_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSERVE_LOG_LEVEL", "verbose")
    with pytest.raises(ConfigurationError, match="QSERVE_LOG_LEVEL: Input should be 'DEBUG', 'INFO'"):
        Settings()
    done = CliRunner().invoke(main, ["deploy", "no_such_module"])
    assert done.exit_code == 1
    assert "Error: QSERVE_LOG_LEVEL: Input should be" in done.output


def test_new_lines_around_a_value_are_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret of Kubernetes that was made of a file ends with one."""
    for name, value in {"REDIS_URL": "redis://host/0", "ADMIN_TOKEN": "token", "NAMESPACE": "shop"}.items():
        monkeypatch.setenv(f"QSERVE_{name}", f"{value}\n")
    found = Settings()
    assert (found.redis_url, found.admin_token, found.namespace) == ("redis://host/0", "token", "shop")
