"""Versions made of the content of an application, and edits of its files."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from qserve.wire.options import DECLARED
from qserve.wire.spec import DeploymentSpec

_NOT_CONTENT = {
    "revision",
    "deployed_at",
    "declared",
    "sources",
    "methods",
    *(each.field for each in DECLARED if not each.option.makes_version),
}


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
