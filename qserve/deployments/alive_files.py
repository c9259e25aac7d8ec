"""How nodes and workers say that they make progress, for whoever restarts them: files that they touch.

It needs no Redis: a node that waits for a server that is away is well, and restarting it would help nobody.
"""

import contextlib
import os
import time

from qserve.this_machine import is_running, runtime_folder, started_at

SAY_EVERY_S = 5.0
STUCK_AFTER_S = 30.0


class AliveFile:
    """The file of this process. It is removed at the end in order, and otherwise left to be found.

    Args:
        what: "node", or "worker of" and the name of a deployment.
    """

    def __init__(self, namespace: str, what: str) -> None:
        folder = runtime_folder() / "alive"
        folder.mkdir(mode=0o700, exist_ok=True)
        # A container that is started again in the same folder gives the numbers of its processes anew.
        self._path = folder / f"{namespace}~{os.getpid()}~{started_at(os.getpid())}~{what}"

    def touch(self) -> None:
        """Say that the process makes progress."""
        with contextlib.suppress(OSError):  # a full disk is no reason to end
            self._path.touch(mode=0o600)

    def remove(self) -> None:
        """Say nothing any more."""
        with contextlib.suppress(OSError):
            self._path.unlink()


def judge(namespace: str) -> tuple[list[str], list[str]]:
    """What runs here and makes progress, and what is wrong: a process that stands still, or no node at all."""
    well, ill, has_node = [], [], False
    for path in sorted((runtime_folder() / "alive").glob(f"{namespace}~*~*~*")):
        _, pid, started, what = path.name.split("~", 3)
        if not is_running(int(pid)) or started_at(int(pid)) != started:
            path.unlink(missing_ok=True)  # it was killed; whoever keeps it has started another one
            continue
        has_node = has_node or what == "node"
        silent_s = time.time() - path.stat().st_mtime
        if silent_s > STUCK_AFTER_S:
            ill.append(f"{what} (pid {pid}) has made no progress for {silent_s:.0f} s")
        else:
            well.append(f"{what} (pid {pid}) is well")
    if not has_node:
        ill.append(f"no node of namespace {namespace!r} runs here under this user")
    return well, ill
