"""User code that tells what process it is in; imported by replicas."""

import multiprocessing
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any


class Fresh:
    """Tells what every new process of Python has, and what it may not have."""

    def __call__(self) -> dict[str, Any]:
        return {
            "argv": sys.argv,
            "directory": str(Path.cwd()),
            "draws": [random.random() for _ in range(3)],
            "files": files_of(os.getpid()),
            "main": sorted(vars(sys.modules["__main__"])),
            "modules": sorted(sys.modules),
            "pid": os.getpid(),
            "stdin": Path("/dev/fd/0").readlink().name,
            "threads": [thread.name for thread in threading.enumerate()],
            "variables": dict(os.environ),
        }

    def modules_of_a_spawned(self) -> list[str]:
        """The modules of ours that a process has which `multiprocessing` spawned."""
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(imported)


def imported() -> list[str]:
    return [name for name in sys.modules if name.startswith(("celery", "qserve_workers"))]


def files_of(pid: int) -> list[str]:
    """What a process has open, as far as another process could have it open, too."""
    found = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(descriptor.readlink()))
        except FileNotFoundError:  # the listing's own
            continue
    return [name for name in found if name.startswith(("socket:", "anon_inode:[eventpoll"))]
