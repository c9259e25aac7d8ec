"""A server that can die and come back with its data."""

import subprocess
from pathlib import Path

from qserve import embedded
from tests.conftest import _wait_until_accepting


class Server:
    """A Valkey that keeps its data on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = embedded.redis_url(folder)
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([*embedded.command(self.folder), "--appendonly", "yes"])
        _wait_until_accepting(embedded.socket_path(self.folder), self.process)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
