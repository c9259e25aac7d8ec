"""What mypy makes of decorated classes and of handles."""

import textwrap
from pathlib import Path

import pytest
from mypy import api

from tests.support.serving import ROOT

PROGRAM = """
from collections.abc import Callable, Coroutine
from typing import Any

from qserve import serve

@serve.deployment(num_replicas=2)
class Counter:
    def __init__(self, start: int = 0) -> None: ...
    def add(self, amount: int) -> int:
        return amount

@serve.deployment
async def double(number: int) -> str:
    return str(number)

Counter.options(name="other").deploy(3)
handle = Counter.get_handle()
reveal_type(handle)
reveal_type(handle.add)
handle.subtract
deployed: serve.Deployment[Callable[[int], Coroutine[Any, Any, str]]] = double
counter: Counter = Counter.func_or_class()
"""


@pytest.mark.timeout(120)
def test_classes_are_deployments_and_handles_know_their_methods(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nstrict = true\nplugins = qserve.mypy_plugin\nmypy_path = {ROOT}\n"
        f"cache_dir = {tmp_path / 'cache'}\nfollow_imports = silent\n"
    )
    report, errors, _ = api.run(["--config-file", str(tmp_path / "mypy.ini"), str(tmp_path / "program.py")])
    assert errors == ""
    assert [line.partition(": ")[2] for line in report.splitlines()[:-1]] == [
        'note: Revealed type is "qserve.calls.handle.DeploymentHandle[program.Counter]"',
        'note: Revealed type is "qserve.calls.handle.DeploymentHandle'
        '[def (amount: int | qserve.calls.ref.Ref[Any]) -> int]"',
        'error: Deployment of "Counter" has no method "subtract"  [misc]',
    ]
