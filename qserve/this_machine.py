"""What a process knows of this machine without asking anybody: its name, this user's folder, which processes run."""

import contextlib
import errno
import functools
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qserve.errors import ConfigurationError

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_RIGHT: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_NO_MORE_FILES: Final = frozenset({errno.EMFILE, errno.ENFILE})


@functools.cache
def this_host() -> str:
    """Names this machine and the process ids that this process sees; empty where they cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def runtime_folder() -> Path:
    """This user's private folder for instance files, sockets and logs.

    Raises:
        ConfigurationError: It belongs to another user, or others may enter it.
    """
    base = os.environ.get("QSERVE_RUNTIME_DIR") or os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "qserve" if base else Path(tempfile.gettempdir()) / f"qserve-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigurationError(
            f"The folder {folder} is for keys, but it belongs to another user, or other users may enter it. Run "
            f"`chmod 700 {folder}` if it is yours, or name another folder in QSERVE_RUNTIME_DIR."
        )
    return folder


@contextlib.contextmanager
def machine_errors() -> Iterator[None]:
    """Within the block, what the machine does not let us do becomes an error that says what to do about it.

    Raises:
        ConfigurationError: There is no room, no right, or no more files can be open.
    """
    try:
        yield
    except OSError as exc:
        if (text := _refusal(exc)) is None:
            raise
        raise ConfigurationError(text) from exc


def _refusal(exc: OSError) -> str | None:
    what = f"{exc.filename}: {exc.strerror}." if exc.filename else f"{exc.strerror}."
    if exc.errno in _NO_ROOM:
        free = "Free some, or name another folder in QSERVE_RUNTIME_DIR."
        return f"This machine has no room for what is to be written: {what} {free}"
    if exc.errno in _NO_RIGHT:
        return f"This machine does not allow it: {what} Files of an instance go where QSERVE_RUNTIME_DIR says."
    if exc.errno in _NO_MORE_FILES:
        return f"This process may open no more files: {what} Raise `ulimit -n`."
    if "temporary directory" in str(exc):
        return f"No file can be written: {exc.strerror}. Free some room, or name a folder in TMPDIR."
    return None


def is_running(pid: int) -> bool:
    """Whether a process of this machine is running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):  # Linux: a zombie, whose parent has not looked yet, has ended too
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def started_at(pid: int) -> str:
    """When a process was started, which tells it from another one of the same number; "" where that cannot be told,
    or it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]
