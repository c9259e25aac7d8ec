"""The files for Compose and systemd: what they start has the time that it needs to leave, and comes back."""

import configparser
from pathlib import Path

import pytest
import yaml

from qserve_gateway.__main__ import main
from qserve_workers.node_workers import STOP_MARGIN_S
from tests.support.serving import ROOT

COMPOSE = [ROOT / "docker-compose.yml", ROOT / "examples/own_app/docker-compose.yml"]
UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))
GRACE_S = 20.0
"""What requests get, and the calls of a deployment that does not say otherwise."""


def unit(path: Path) -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None)
    found.read(path)
    return found


def test_a_gateway_waits_for_so_long_if_it_is_not_told_otherwise() -> None:
    [option] = [each for each in main.params if each.name == "graceful_shutdown_timeout_s"]
    assert option.default == GRACE_S


@pytest.mark.parametrize("path", COMPOSE, ids=["examples", "own_app"])
@pytest.mark.parametrize("service", ["gateway", "worker"])
def test_compose_kills_nothing_that_may_still_finish_its_calls(path: Path, service: str) -> None:
    found = yaml.safe_load(path.read_text())["services"][service]
    assert float(found.get("stop_grace_period", "10s").removesuffix("s")) >= GRACE_S + STOP_MARGIN_S


@pytest.mark.parametrize("path", COMPOSE, ids=["examples", "own_app"])
@pytest.mark.parametrize("service", ["deploy", "gateway", "worker"])
def test_what_compose_starts_hears_from_the_beginning_that_it_is_to_leave(path: Path, service: str) -> None:
    """The first process of a container ignores SIGTERM until it has a handler, and is killed in the end."""
    assert yaml.safe_load(path.read_text())["services"][service]["init"] is True


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_starts_it_again_for_as_long_as_it_takes_and_kills_it_late(path: Path) -> None:
    """Its own limit is five starts in ten seconds: a node that refuses its server would be over it at once."""
    found = unit(path)
    assert (found["Unit"]["StartLimitIntervalSec"], found["Service"]["Restart"]) == ("0", "always")
    assert float(found["Service"]["TimeoutStopSec"]) >= GRACE_S + STOP_MARGIN_S


def test_gateways_and_nodes_import_hooks_and_middlewares_from_the_same_folder() -> None:
    assert len({unit(path)["Service"]["WorkingDirectory"] for path in UNITS}) == 1
