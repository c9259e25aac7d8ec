"""What replicas print, in the terminal of a script that has started their instance and goes on."""

import atexit
import threading
from pathlib import Path
from typing import Final

from qserve.deployments.driver import THIS_PROCESS
from qserve.screen.terminal import Relay, show_line
from qserve.telemetry.log_reading import GrowingFile

_LOOK_S: Final = 0.1
_LAST_LINES_S: Final = 2.0


class LogFollower:
    """Shows the log of an instance as `Relay` does, while its processes write it."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._is_registered = False

    def register(self) -> None:
        """Show the last lines when this process ends; called before it starts an instance, which then ends earlier."""
        if not self._is_registered:
            self._is_registered = True
            atexit.register(self.end)

    def follow(self, path: Path | None) -> None:
        """Show what is written from now on, and what was before; without effect for a file that is followed already."""
        if path is None or path == self._path:
            return
        self.end()
        self._path, self._ended = path, threading.Event()
        self._thread = threading.Thread(target=self._run, args=(path, self._ended), name="qserve-output", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Show what is left, and nothing more."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(_LAST_LINES_S)
            self._thread = None

    @staticmethod
    def _run(path: Path, ended: threading.Event) -> None:
        relay = Relay(everything=False)
        with GrowingFile(path) as log:
            is_last = False
            while not is_last:
                is_last = ended.is_set()
                for line in log.lines():
                    for shown in relay.feed(line.rstrip("\n")):
                        show_line(shown)
                if not is_last:
                    ended.wait(_LOOK_S)


_follower: Final = LogFollower()


def before_start() -> None:
    """Called before this process starts an instance, perhaps."""
    _follower.register()


def show_output() -> None:
    """Show what the replicas of this process's own instance print, if it has one that writes a log."""
    _follower.follow(THIS_PROCESS.own_log_file)
