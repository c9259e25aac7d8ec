"""Which files an application is made of: to notice an edit, and to tell versions apart."""

import hashlib
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import msgspec

from qserve.wire.options import DECLARED
from qserve.wire.spec import DeploymentSpec

_NOT_CONTENT = {
    "revision",
    "deployed_at",
    "declared",
    *(each.field for each in DECLARED if not each.option.makes_version),
}


def project_files(folder: Path, modules: Iterable[str] = ()) -> list[Path]:
    """Source files of the imported modules below `folder`, without installed ones, and of the named modules."""
    folder = folder.resolve()
    own = ("qserve", "qserve_gateway", "qserve_workers")
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib")}
    named = set(modules)
    found: set[Path] = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or name.partition(".")[0] in own:
            continue
        path = Path(file).resolve()
        inside = path.is_relative_to(folder) and not any(path.is_relative_to(place) for place in installed)
        if inside or name in named:
            found.add(path)
    return sorted(found)


def content_version(spec: DeploymentSpec, folder: Path, files: Iterable[Path]) -> str:
    """A version that changes when code or constructor arguments change, and only then.

    Args:
        folder: Files below it count by their name relative to it, so that it does not matter where a checkout stands.
    """
    spec = msgspec.structs.replace(spec, target=msgspec.structs.replace(spec.target, sys_path=()))
    digest = hashlib.sha256()
    for name, value in sorted(msgspec.structs.asdict(spec).items()):
        if name not in _NOT_CONTENT:
            digest.update(f"{name}={value!r}\n".encode())
    for path in files:
        shown = path.relative_to(folder) if path.is_relative_to(folder) else path
        digest.update(f"{shown}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Watcher:
    """Notices edits by looking at modification times.

    Args:
        files: What to look at; replace it with `watch` when the application has been imported again.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._stamps = {path: _stamp(path) for path in files}

    def watch(self, files: Iterable[Path]) -> None:
        """Look at these from now on; what was already seen of a file is kept."""
        self._stamps = {path: self._stamps.get(path, _stamp(path)) for path in files}

    def changed(self) -> list[Path]:
        """Files that are different from the last time; each edit is told once. A file that is gone has not changed
        yet: editors replace files by renaming."""
        edited = []
        for path, before in self._stamps.items():
            now = _stamp(path)
            if now is not None and now != before:
                self._stamps[path] = now
                edited.append(path)
        return edited


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size
