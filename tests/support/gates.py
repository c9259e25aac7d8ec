"""What deployments of these tests share with the tests: files they wait for and write to. Travels by value."""

import asyncio
import os
import time
from pathlib import Path


class Gate:
    """Closed until someone opens it, in whatever process."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def open(self) -> None:
        """Let everybody pass, for good."""
        Path(self._path).touch()

    def pass_through(self) -> None:
        """Wait for it, keeping the thread."""
        while not Path(self._path).exists():
            time.sleep(0.005)

    async def passed(self) -> None:
        """Wait for it, leaving the event loop free."""
        while not Path(self._path).exists():  # noqa: ASYNC110, ASYNC240 lives on the disk
            await asyncio.sleep(0.005)


class Notes:
    """Lines that any process can add to."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def add(self, line: object) -> None:
        """Add a line."""
        descriptor = os.open(self._path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        try:
            os.write(descriptor, f"{line}\n".encode())
        finally:
            os.close(descriptor)

    def read(self) -> list[str]:
        """All lines."""
        path = Path(self._path)
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, count: int) -> list[str]:
        """All lines, once there are that many."""
        from tests.support.waiting import wait_until  # not at the top: replicas get this module by value

        wait_until(lambda: len(self.read()) >= count, shows=self.read)
        return self.read()


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
