"""The log files of instances that scripts start, or that run detached: where they are, and how many are kept."""

import contextlib
import os
import tempfile
import time
from pathlib import Path

KEPT = 5
"""How many log files of a namespace are kept, that of the running instance among them."""
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
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    descriptor, made = tempfile.mkstemp(".log", f"{namespace}~{time.strftime('%Y%m%d-%H%M%S')}-", logs)
    os.close(descriptor)
    return Path(made)


def newest_log_file(folder: Path, namespace: str) -> Path | None:
    """The log file that was written last; None where there is none."""
    return next(reversed(_files(folder, namespace)), None)


def _files(folder: Path, namespace: str) -> list[Path]:
    return sorted((folder / "logs").glob(f"{namespace}~*.log"), key=lambda path: path.stat().st_mtime_ns)


def log_tail(path: Path) -> str:
    """The end of a log file. Raises OSError where it cannot be read."""
    return path.read_text(errors="replace")[-_TAIL:].strip()
