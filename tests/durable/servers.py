"""A server that can die and come back, with its data or without, or freeze."""

import signal
import subprocess
from pathlib import Path

from qserve.broker import embedded
from tests.conftest import _wait_until_accepting


class Server:
    """A Valkey that keeps its data on the disk, unless told otherwise."""

    def __init__(self, folder: Path, *, keeps_data: bool = True) -> None:
        self.folder = folder
        self.url = embedded.redis_url(folder)
        # "everysec" holds back writes while the disk is busy, for two seconds at most: a kill would cost them.
        self._options = ["--appendonly", "yes", "--appendfsync", "always"] if keeps_data else []
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([*embedded.command(self.folder), *self._options])
        _wait_until_accepting(embedded.socket_path(self.folder), self.process)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)
