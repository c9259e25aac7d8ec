"""The Helm chart, rendered: for its tests, and for the manifests of those who do without Helm.

`python -m tests.support.chart` writes the expected results anew (`make tables` does so, too).
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support.serving import ROOT

CHART = ROOT / "deploy/helm/qserve"
VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
EXPECTED = ROOT / "tests/golden/chart"
RULES = ROOT / "deploy/observability/rules.yml"
RULES_IN_CHART = CHART / "files/rules.yaml"  # a chart holds no files from outside its folder
PLAIN = ROOT / "deploy/kubernetes/qserve.yaml"

_HELM_LABELS = re.compile(r"^ +(helm\.sh/chart|app\.kubernetes\.io/managed-by): .*\n", re.MULTILINE)
_HELM_HOOK = re.compile(r"^  annotations:\n    helm\.sh/hook: .*\n    helm\.sh/hook-delete-policy: .*\n", re.MULTILINE)
_SOURCE = re.compile(r"^# Source: .*\n", re.MULTILINE)
_PLAIN_HEAD = """\
# What the chart renders with its default values, for those who do without Helm; `make tables` writes this file.
# kustomization.yaml beside it makes the secret.
"""


class ChartError(Exception):
    """Helm refused; its text says why."""


def helm(*arguments: str) -> str:
    """Run Helm, which a package of PyPI brings along.

    Raises:
        ChartError: Helm refused.
    """
    command = [str(Path(sys.executable).parent / "helm"), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise ChartError(done.stderr + done.stdout)
    return done.stdout


def render(values: Path | None = None, *sets: str, release: str = "q") -> str:
    """What the chart renders, with every secret that it makes masked.

    Args:
        values: A file of values; the chart's own without.
        sets: "key=value" pairs.
    """
    given = ["--values", str(values)] if values is not None else []
    text = helm("template", release, str(CHART), "--namespace", "shop", *given, *(f"--set={each}" for each in sets))
    return re.sub(r"^(  (?:secret|valkey-password|admin-token): )\S+$", r"\1bWFza2Vk", text, flags=re.MULTILINE)


def documents(text: str) -> list[dict[str, Any]]:
    """The objects in a rendered text."""
    return [each for each in yaml.safe_load_all(text) if each is not None]


def expected_of(values: Path) -> Path:
    """The file with the expected result of a file of values."""
    return EXPECTED / values.name.replace("-values", "")


def plain() -> str:
    """The manifests for those who do without Helm: the default ones, without Helm's marks and its secret."""
    text = render(release="qserve")
    for mark in (_HELM_LABELS, _HELM_HOOK, _SOURCE):
        text = mark.sub("", text)
    parts = re.split(r"^---\n", text, flags=re.MULTILINE)
    kept = [part for part in parts if part.strip() and "kind: Secret" not in part]
    return _PLAIN_HEAD + "".join(f"---\n{part}" for part in kept)


def write() -> None:
    """Write the expected results and the plain manifests."""
    RULES_IN_CHART.write_text(RULES.read_text())
    EXPECTED.mkdir(parents=True, exist_ok=True)
    for values in VALUES:
        expected_of(values).write_text(render(values))
    PLAIN.write_text(plain())


if __name__ == "__main__":
    write()
