"""Files of an application that hide modules which qserve itself needs. It imports nothing that may be hidden."""

import os
import sys
from pathlib import Path

from qserve.errors import ConfigurationError

_NEEDED = frozenset(
    {"qserve", "qserve_gateway", "qserve_workers", "celery", "click", "fastapi", "kombu", "msgspec", "pydantic"}
    | {"redis", "rich", "starlette", "uvicorn", "uvloop"}
)
"""Modules that processes of qserve import: a file of such a name in the folder of an application hides them."""


def refuse_hidden_modules(folder: Path) -> None:
    """Raise if a file of the application would be imported for a module that qserve itself needs."""
    if (folder / "qserve" / "cli" / "project" / "lookup.py").is_file():  # qserve's own checkout
        return
    for path in sorted(folder.iterdir()):
        name = path.stem if path.suffix == ".py" or (path / "__init__.py").is_file() else ""
        if name in _NEEDED or _is_needed_of_python(name, folder):
            kind = "the standard module" if name in sys.stdlib_module_names else "the module"
            raise ConfigurationError(f"{path} hides {kind} {name!r}, which qserve itself needs. Give it another name.")


def _is_needed_of_python(name: str, folder: Path) -> bool:
    if name not in sys.stdlib_module_names or name not in sys.modules:
        return False
    file = getattr(sys.modules[name], "__file__", None)
    return file is None or not Path(file).resolve().is_relative_to(folder)


def what_hides(error: ImportError | AttributeError) -> str | None:
    """The sentence for an error that is there because a file on PYTHONPATH hides a module; None if none does."""
    name = error.name if isinstance(error, ImportError) else getattr(error.obj, "__name__", "")
    name = (name or "").partition(".")[0]
    file = getattr(sys.modules.get(name), "__file__", None)
    if name not in _NEEDED or file is None:
        return None
    folders = [Path(each).resolve() for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    found = Path(file).resolve()
    if not any(folder in found.parents and "site-packages" not in found.parts for folder in folders):
        return None
    return f"{found} hides the module {name!r}, which qserve itself needs. Give it another name, or change PYTHONPATH."
