"""Code of a script, from the process that deploys it to the one that serves it: `hand_over` there, this module here."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from qserve.deployments.deployment import Deployment
from qserve.deployments.loading import load_target, make_target
from qserve.wire.spec import Target
from tests.support.slowness import patience

ROOT = Path(__file__).parents[2]
_IMPORTS = "from qserve import serve\nfrom tests.support.script_code import hand_over\n"


def hand_over(deployment: Any, *, allow_pickle: bool = True) -> None:
    """Print the target of a deployment, as the last thing that a script does."""
    assert isinstance(deployment, Deployment)
    target = make_target(deployment.func_or_class, allow_pickle=allow_pickle)
    print(msgspec.json.encode(target).decode())  # noqa: T201


def target_of(script: Path, source: str, *, module: str = "") -> Target:
    """What a script hands over.

    Args:
        source: Its text; a `future` import has to be the first line.
        module: Run it as `python -m module` from the folder of its package.
    """
    first, _, rest = textwrap.dedent(source).lstrip().partition("\n")
    script.write_text(
        first + "\n" + _IMPORTS + rest if first.startswith("from __future__") else _IMPORTS + first + "\n" + rest
    )
    command = ["-m", module] if module else [str(script)]
    done = _python(command, script.parents[module.count(".")])
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Target)


def error_of(script: Path, source: str) -> str:
    """What a script ends with that cannot hand its code over."""
    script.write_text(_IMPORTS + textwrap.dedent(source))
    done = _python([str(script)], script.parent)
    assert done.returncode == 1, done
    return done.stderr.strip().splitlines()[-1]


def answers(target: Target, *requests: Sequence[Any]) -> list[Any]:
    """What another process answers that serves the target: [status, JSON or text] for each [method, path, JSON]."""
    given = json.dumps([msgspec.to_builtins(msgspec.json.encode(target).decode()), requests])
    done = _python(["-m", "tests.support.script_code"], ROOT, given)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def call(target: Target, *args: Any) -> Any:
    """The result of calling what another process loads: a function, or an instance of the class."""
    return answers(target, ["CALL", "", args])[0]


def _python(arguments: list[str], folder: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input=given,
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )


def _serve() -> None:
    from starlette.testclient import TestClient

    from qserve.deployments.ingress import bind_app

    encoded, requests = json.load(sys.stdin)
    code: Any = load_target(msgspec.json.decode(encoded, type=Target), as_main=True)
    found: list[Any] = []
    if requests and requests[0][0] == "CALL":
        made = code() if isinstance(code, type) else code
        found = [made(*args) for _, _, args in requests]
    else:
        with TestClient(bind_app(code()), follow_redirects=False) as client:
            for method, path, body in requests:
                response = client.request(method, path, json=body)
                is_json = response.headers.get("content-type") == "application/json"
                found.append([response.status_code, response.json() if is_json else response.text])
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    _serve()
