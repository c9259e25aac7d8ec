"""Which source files the code of a deployment comes from, and whether they are what they were when it was deployed.

A spec names most code by its import path: a replica imports what is in the files when it starts.
"""

import functools
import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

_OWN: Final = ("qserve", "qserve_gateway", "qserve_workers")
_MAIN: Final = ("__main__", "__mp_main__")
_MOST: Final = 1_000
"""Of so many files digests are kept in a spec."""


def project_files(folder: Path, modules: Iterable[str] = ()) -> list[Path]:
    """Source files of the imported modules below `folder`, without installed ones, and of the named modules."""
    inside, named = _below([str(folder)]), set(modules)
    return sorted({Path(path) for name, path in _imported_files() if name in named or inside(path)})


def source_digests(folders: Iterable[str], module: str, *, is_pickled: bool) -> tuple[tuple[str, str], ...]:
    """The files from which replicas will import the code of a deployment and what it uses, each with a digest.

    Args:
        folders: Where they look for modules.
        module: The name of the module that defines the code.
        is_pickled: The code itself is sent to them.
    """
    package, inside, imported = module.partition(".")[0], _below(folders), list(_imported_files())
    found = {path for name, path in imported if inside(path) or name.partition(".")[0] == package}
    if is_pickled:  # and so the code of the script is in there
        found -= {path for name, path in imported if name in _MAIN}
    digests = ((path, _digest(path)) for path in sorted(found) if path.endswith(".py"))
    return tuple((path, digest) for path, digest in digests if digest)[:_MOST]


def changed_files(sources: tuple[tuple[str, str], ...]) -> list[str] | None:
    """Those files that are not what they were when `source_digests` looked; None where that cannot be told here."""
    here = {path: _digest(path) for path, _ in sources if path.endswith(".py")}
    if not any(here.values()):
        return None
    changed = [path for path, digest in sources if here.get(path) != digest]
    return None if not changed and len(sources) >= _MOST else changed


def _below(folders: Iterable[str]) -> Callable[[str], bool]:
    """What tells whether a path is in one of these folders, and not among what is installed."""
    wanted = tuple(_real(folder).rstrip(os.sep) + os.sep for folder in folders)
    installed = tuple(_real(sysconfig.get_path(kind)) + os.sep for kind in ("stdlib", "purelib", "platlib"))
    return lambda path: path.startswith(wanted) and not path.startswith(installed)


def _imported_files() -> Iterator[tuple[str, str]]:
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name.partition(".")[0] not in _OWN:
            folder, base = os.path.split(file)
            yield name, _real(folder) + os.sep + base


@functools.cache  # of thousands of modules, most are in few folders
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if Path(path).is_file() else ""
    except OSError:
        return ""
