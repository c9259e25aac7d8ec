"""Prometheus' own tool takes the files of deploy/observability, and each alert fires at what it is for."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.serving import ROOT

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: Debian's prometheus has it")
OBSERVABILITY = ROOT / "deploy/observability"


def promtool(folder: Path, *arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=folder, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_configuration_and_rules() -> None:
    promtool(OBSERVABILITY, "check", "config", "--syntax-only", "prometheus.yml")
    promtool(OBSERVABILITY, "check", "rules", "rules.yml")


def test_each_alert_fires_at_what_it_is_for_and_at_nothing_else() -> None:
    promtool(Path(__file__).parent, "test", "rules", "alerts.yml")
