"""The projects that `qserve init` writes pass their own tests."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.serving import runtime_folder
from tests.support.shell import Shell
from tests.support.slowness import patience


@pytest.mark.parametrize("template", ["minimal", "fastapi", "batching", "llm-stream"])
def test_a_new_project_passes_its_own_test(tmp_path: Path, template: str) -> None:
    with runtime_folder() as runtime:
        shell = Shell(tmp_path, runtime)
        assert shell.run("init", "--template", template, "project").returncode == 0
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            command,
            cwd=tmp_path / "project",
            env=shell.environment,
            capture_output=True,
            text=True,
            timeout=patience(50),
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
