"""The log files of instances that scripts start, or that run detached: where they are, and how many are kept."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Final

KEPT = 5
"""How many log files of a namespace are kept, that of the running instance among them."""
LARGEST_BYTES: Final = 64 << 20
"""A log that is longer is rotated. What it was before stays once more, as a file with `.1` behind its name."""
_TAIL = 2_000


def new_log_file(folder: Path, namespace: str) -> Path:
    """Make the log file of an instance that is about to start. Older ones stay, as far as `KEPT` says.

    Args:
        folder: The folder in which the folder of the log files is, or will be.
    """
    logs = folder / "logs"
    logs.mkdir(mode=0o700, exist_ok=True)
    older = _files(folder, namespace)
    for path in older[: max(0, len(older) - KEPT + 1)]:
        for each in files_of(path):
            each.unlink(missing_ok=True)
    descriptor, made = tempfile.mkstemp(".log", f"{namespace}~{time.strftime('%Y%m%d-%H%M%S')}-", logs)
    os.close(descriptor)
    return Path(made)


def newest_log_file(folder: Path, namespace: str) -> Path | None:
    """The log file that was written last; None where there is none."""
    return next(reversed(_files(folder, namespace)), None)


def _files(folder: Path, namespace: str) -> list[Path]:
    return sorted((folder / "logs").glob(f"{namespace}~*.log"), key=lambda path: path.stat().st_mtime_ns)


def files_of(path: Path) -> list[Path]:
    """A log file and what was cut off from it, the newest first."""
    older = {int(each.suffix[1:]): each for each in path.parent.glob(f"{path.name}.*") if each.suffix[1:].isdigit()}
    return [path, *(older[number] for number in sorted(older))]


def rotate_if_long(path: Path) -> None:
    """Begin a log file anew if it has become long.

    The processes that write to it keep it open, so it is copied and cut, as logrotate's `copytruncate` does: what is
    written between the two is lost.

    Raises:
        OSError: That is not possible, for want of room for example.
    """
    size = path.stat().st_size
    if size <= LARGEST_BYTES:
        return
    with path.open("r+b") as log, path.with_name(f"{path.name}.1").open("wb") as older:
        log.seek(size - LARGEST_BYTES)
        shutil.copyfileobj(log, older, 1 << 20)
        log.truncate(0)


def log_tail(path: Path) -> str:
    """The end of a log file. Raises OSError where it cannot be read."""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - 2 * _TAIL))
        return log.read().decode(errors="replace")[-_TAIL:].strip()
