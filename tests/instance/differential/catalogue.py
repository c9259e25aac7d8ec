"""The applications of `apps/`, one module each: `app`, `Served` (its ingress class) and `CASES`."""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.instance.differential.case import Case

APPS = Path(__file__).parent / "apps"


@dataclass(frozen=True)
class Topic:
    """One application, under the same prefix on both sides.

    Attributes:
        prefix: "/<module>", unless the module has a `PREFIX`.
        app: What plain uvicorn serves: the module's `PLAIN` or else its `app`.
        ingress: The class that is deployed.
    """

    name: str
    prefix: str
    app: Any = field(repr=False)
    ingress: type = field(repr=False)
    cases: tuple[Case, ...] = field(repr=False)


def load_topics() -> list[Topic]:
    """All applications, in alphabetical order."""
    return [_load(path.stem) for path in sorted(APPS.glob("[!_]*.py"))]


def _load(name: str) -> Topic:
    module = importlib.import_module(f"tests.instance.differential.apps.{name}")
    names = [case.name for case in module.CASES]
    assert len(names) == len(set(names)), f"two cases of {name} have one name"
    prefix = getattr(module, "PREFIX", f"/{name}")
    return Topic(name, prefix, getattr(module, "PLAIN", module.app), module.Served, tuple(module.CASES))
