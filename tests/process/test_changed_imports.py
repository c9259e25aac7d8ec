"""The command of docs/coming-from-ray-serve.md, which changes the imports of programs for Ray Serve."""

import re
import subprocess
from pathlib import Path


def changed_imports(*lines: str) -> list[str]:
    """Lines after the command that docs/coming-from-ray-serve.md gives."""
    page = Path(__file__).parents[2] / "docs" / "coming-from-ray-serve.md"
    [command] = re.findall(r"^sed -i -E '(.*?)' app\.py$", page.read_text(), re.DOTALL | re.MULTILINE)
    given = "\n".join(lines)
    done = subprocess.run(["sed", "-E", command], input=given, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_imports_are_changed_to_names_that_exist() -> None:
    changed = changed_imports(
        "from ray import serve",
        "import ray",
        "from ray.serve.handle import DeploymentHandle",
        "from ray.serve.config import AutoscalingConfig, AutoscalingContext, HTTPOptions, ProxyLocation",
        "from ray.serve.metrics import Counter, Gauge, Histogram",
        "from ray.util.metrics import Counter as AnotherCounter",
        "from ray.util import metrics",
        "from ray.serve.schema import CeleryAdapterConfig, TaskProcessorConfig",
        "from ray.serve.task_consumer import task_consumer",
    )
    assert "ray.serve" not in "".join(changed)
    exec("\n".join(changed), {})
