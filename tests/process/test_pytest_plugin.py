"""The fixtures that qserve brings to pytest."""

import subprocess
import sys
from pathlib import Path

_TESTS = """
from qserve import serve

@serve.deployment
def double(number: int) -> int:
    return 2 * number

def test_local(qserve_local):
    served = qserve_local(double)
    assert served.handle.remote(21).result(timeout=10) == 42

def test_instance(qserve_instance):
    double.deploy()
    assert double.get_handle().remote(21).result(timeout=30) == 42

def test_the_next_one_finds_nothing(qserve_instance):
    assert serve.list_deployments() == {}
"""


def test_the_plugin_imports_nothing_before_it_is_used() -> None:
    code = "import sys, qserve.pytest_plugin; print('qserve.serve' in sys.modules, 'starlette' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_fixtures_serve_the_tests_of_an_application(tmp_path: Path) -> None:
    (tmp_path / "test_double.py").write_text(_TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert "3 passed" in done.stdout, done.stdout + done.stderr
