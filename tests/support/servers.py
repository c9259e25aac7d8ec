"""A server that can die and come back, with its data or without, or freeze."""

import secrets
import signal
import socket
import subprocess
from pathlib import Path

from qserve.broker.server import embedded
from tests.support.waiting import wait_until

SECRET = "test-" + secrets.token_hex(16)


class ServerProcess:
    """The process of a server, to do harm to."""

    process: "subprocess.Popen[bytes]"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)


class Server(ServerProcess):
    """A Valkey that keeps its data on the disk, unless told otherwise."""

    def __init__(self, folder: Path, *, keeps_data: bool = True) -> None:
        self.folder = folder
        self.url = embedded.redis_url(folder)
        # "everysec" holds back writes while the disk is busy, for two seconds at most: a kill would cost them.
        self._options = ["--appendonly", "yes", "--appendfsync", "always"] if keeps_data else []
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([*embedded.command(self.folder), *self._options])
        wait_until_accepting(embedded.socket_path(self.folder), self.process)


def wait_until_accepting(path: Path, valkey: "subprocess.Popen[bytes]") -> None:
    """Wait until a server that was just started answers on its socket."""

    def accepts() -> bool:
        assert valkey.poll() is None, f"the Valkey on {path} has ended"
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(path)) == 0

    wait_until(accepts)
