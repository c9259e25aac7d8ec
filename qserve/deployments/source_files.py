"""Which source files the code of a deployment comes from, and whether they are what they were when it was deployed.

A spec names most code by its import path: a replica imports what is in the files when it starts.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Final

from qserve.deployments.driver_script import MAIN
from qserve.wire.spec import Target

_OWN: Final = ("qserve", "qserve_gateway", "qserve_workers")
_MOST: Final = 1_000
"""Of so many files digests are kept in a spec."""


def project_files(folder: Path, modules: Iterable[str] = ()) -> list[Path]:
    """Source files of the imported modules below `folder`, without installed ones, and of the named modules."""
    folder = folder.resolve()
    named = set(modules)
    installed = [Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib")]
    return sorted(
        {
            path
            for name, path in _imported_files(sys.modules)
            if name in named
            or (path.is_relative_to(folder) and not any(path.is_relative_to(place) for place in installed))
        }
    )


def source_digests(target: Target, module: str) -> tuple[tuple[str, str], ...]:
    """The files from which replicas will import the code of a target and what it uses, each with a digest.

    Args:
        module: The name of the module that defines the code.
    """
    package = module.partition(".")[0]
    found = {path for folder in target.sys_path for path in project_files(Path(folder))}
    found |= {path for name, path in _imported_files(sys.modules) if name.partition(".")[0] == package}
    if target.pickled:  # and so the code of the script is in there
        found -= {path for name, path in _imported_files(sys.modules) if name in (MAIN, "__mp_main__")}
    digests = ((str(path), _digest(path)) for path in sorted(found) if path.suffix == ".py")
    return tuple((path, digest) for path, digest in digests if digest)[:_MOST]


def changed_files(sources: tuple[tuple[str, str], ...]) -> list[str] | None:
    """Those files that are not what they were when `source_digests` looked; None where that cannot be told here."""
    here = {path: _digest(Path(path)) for path, _ in sources if path.endswith(".py")}
    if not any(here.values()):
        return None
    changed = [path for path, digest in sources if here.get(path) != digest]
    return None if not changed and len(sources) >= _MOST else changed


def _imported_files(modules: Mapping[str, ModuleType]) -> Iterator[tuple[str, Path]]:
    for name, module in list(modules.items()):
        file = getattr(module, "__file__", None)
        if file and name.partition(".")[0] not in _OWN:
            yield name, Path(file).resolve()


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""
    except OSError:
        return ""
