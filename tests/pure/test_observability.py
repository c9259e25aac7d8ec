"""The Compose profile `observe` and the files that it mounts agree with each other."""

import re
from typing import Any

import pytest
import yaml

from tests.support.serving import ROOT

OBSERVABILITY = ROOT / "deploy/observability"
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def read(name: str) -> Any:
    return yaml.safe_load((OBSERVABILITY / name).read_text())


def test_what_the_profile_mounts_is_there() -> None:
    observing = {name: service for name, service in SERVICES.items() if service.get("profiles") == ["observe"]}
    assert observing.keys() == {"prometheus", "grafana"}
    for service in observing.values():
        for volume in service["volumes"]:
            assert (ROOT / volume.split(":")[0]).exists(), volume


def test_prometheus_finds_gateways_with_the_token_of_compose() -> None:
    (job,) = read("prometheus.yml")["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert SERVICES.keys() >= set(found["names"]) == {"gateway"}
    assert f"QSERVE_ADMIN_PORT={found['port']}" in (ROOT / "docs/telemetry.md").read_text()
    (command,) = SERVICES["prometheus"]["command"]
    assert f"> {job['authorization']['credentials_file']} " in command
    assert "QSERVE_ADMIN_TOKEN" in SERVICES["prometheus"]["environment"]


def test_grafana_finds_prometheus_and_the_board() -> None:
    (source,) = read("grafana/datasource.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = read("grafana/provisioning.yml")["providers"]
    mounted = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert mounted["./deploy/observability/grafana"] == provider["options"]["path"]


@pytest.mark.parametrize("page", ["operations.md", "alerts.md"])
def test_a_page_names_metrics_as_prometheus_has_them(page: str) -> None:
    """A counter is asked for with its `_total`."""
    names = re.compile(r"`(qserve_[a-z_]+)(?=[`{])")
    listed = set(names.findall((ROOT / "docs/telemetry.md").read_text()))
    assert set(names.findall((ROOT / "docs" / page).read_text())) <= listed
